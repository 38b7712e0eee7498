"""What is remembered of requests and actions, in one SQLite file, and the questions that are asked of it.

scribe     from what control hears and decides to rows
store      the file: its tables, its limits, its version
keeper     the thread that writes it, off everybody's way
questions  why a request, a model or a moment went as it did

Knows rows and reasons. Does not know sockets, HTTP or schedulers; is told the time by whoever decides.
"""
