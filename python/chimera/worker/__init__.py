"""One warm process: it holds an engine, becomes one model after another, and has no model identity of its own.

Also the preloaded parent that workers fork from. Decides nothing: orders come from its agent, tokens go straight to the
front-ends. Knows nothing of queues, policies or HTTP.
"""
