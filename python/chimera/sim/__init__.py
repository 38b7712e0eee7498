"""A cluster on paper, in virtual time: the real schedulers, with engines that cost what the cost table says.

    clock      what happens next: a heap keyed by (time, sequence)
    gpu        one GPU on paper: memory in stripes, turns between engines, the link that weights come over
    engine     one replica's engine: continuous batching, chunked prefill, drain
    cluster    control, agents, engines and a front-end, and the messages between them
    chronicle  what happened, for the log and for Chrome's trace viewer
    run        one simulation from its inputs to its figures

Knows no process, no socket and no device. The same inputs and the same seed give the same bytes.
"""
