"""Frames and sockets between our processes. Knows the message types as data; decides nothing and starts nothing."""
