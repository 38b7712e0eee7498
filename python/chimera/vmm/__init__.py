"""Virtual memory: ranges of addresses that stay, and physical memory that comes and goes under them.

Owns the one protocol of four nouns (range, handle, offset, run) and its three drivers: `cuda` for NVIDIA devices, `host`
for any Linux machine, `fake` for arithmetic alone. Knows no tensor, no model, no lease and no policy.
"""
