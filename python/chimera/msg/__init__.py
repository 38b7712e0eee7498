"""Every type that crosses from one process to another: events up, actions down, and the stream of a request.

These frozen structs are both the words of the schedulers and the wire types: there is no second form. Knows nothing
of sockets (`wire/`) or of what is decided (`sched/`). Every action carries a `reason` that people will read.
"""
