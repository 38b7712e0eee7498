"""Elastic KV memory: tensors that keep their addresses while the memory under them grows and shrinks.

Owns arenas (a range of one lease class), layouts (where a token's cache lies), pools in stripes, the slot allocator that
fills the fullest stripes first, the reserve of created handles, and the choice of what to give back. Knows no engine, no
socket and no policy: it is told how much it may hold and what the contents are worth.
"""
