"""Engines behind one protocol (`api.py`): stock SGLang and a simulated one. The only room beside `parsing/` that knows
SGLang, and the only one that knows the insides of a model. Knows nothing of queues, placement, sockets or HTTP.
"""
