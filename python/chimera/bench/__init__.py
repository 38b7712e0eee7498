"""The replay benchmark: sends a trace to a server, any server, and says what came of it.

    prompts   seeded text of exactly so many tokens, with prefixes that are shared as wanted
    dialect   the bodies and events of the APIs that are spoken: completions, chat, generate
    stream    one HTTP connection, one answer at a time, as thin as it can be
    load      when each request is sent: open loop by the clock, closed loop by concurrency
    record    one request as its client saw it: a line of JSON
    watch     what the server tells of itself meanwhile: memory by model, models that come and go
    outcome   a run in figures: the peers' JSON keys and banner, and the words of docs/metrics.md
    promise   the latencies a model owes: its placement's, flags, or a calibration times a scale
    paired    two runs of one trace against each other, with bootstrap intervals
    chart, page    the report: one HTML page, and PNGs

Knows a server by its HTTP API alone; times are monotonic, so a wall clock that jumps changes nothing.
"""
