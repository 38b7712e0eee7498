"""One node: its GPU schedulers' loop, its workers, and the payloads of the requests that wait for them.

    agent     feeds the node's scheduler from sockets and carries out what it decides
    pool      the worker processes: forked, greeted, used again, watched until they are gone

Decides nothing: order, admission and epochs are `sched.node`'s. Holds no device context and imports no engine.
"""
