"""What the operator wrote, turned into nouns: placement files, model folders, virtual GPUs. The only reader of files
and environment. Knows no running server, engine or device.

Whatever is wrong comes back in one `ConfigError` that lists every fault with its place in the document.
"""
