"""Control's process: the loop around the dispatcher and the placement, and the meeting point of agents and front-ends.

    exchange   who is connected, which payloads wait here, and the feeding of the scheduler
    telemetry  the counters that workers report, laid over the scheduler's own snapshot
    lookout    what viewers see of it, a second at a time

Decides nothing: `sched.control` does. Knows no engine, no device and no HTTP.
"""
