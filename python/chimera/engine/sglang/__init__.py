"""Stock SGLang as one of our engines: started in this process, fed and read without its sockets.

Each reach into SGLang is a small named function with its reason; `versions.py` refuses a release it was not read for.
"""
