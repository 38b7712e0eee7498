"""What the operator wrote and what the machine is, turned into nouns: placement files, model folders, virtual GPUs, the
doctor's facts. The only reader of files and environment. Knows no running server and no engine, and uses no device.

Whatever is wrong comes back in one `ConfigError` that lists every fault with its place in the document.
"""
