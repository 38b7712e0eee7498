"""Frames, sockets and vigils between our processes, and the loop they have in common.

Knows the message types as data; decides nothing and starts nothing.
"""
