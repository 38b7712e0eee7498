"""Decisions, and nothing else: `scheduler.on(event, now) -> actions`.

Knows the nouns and the messages; is told the time, never asks; draws no random number, writes no line, opens no socket.
The same events at the same times give the same actions, so the live server, the simulator and `chimera
replay-decisions` run the very same objects.

    queues    in which order requests leave a queue
    gpu       one GPU: order, credits and admission; mints epochs
    node      the GPUs of one agent; what the agent's loop talks to
    places    a wanted replica, and how far it has come
    control   the one door to the three below; what control's loop talks to
    dispatch  where a request is between its arrival and its end, and which replica it goes to
    lives     brings up what is wanted, and follows how far each replica has come
    plan      what is wanted: the policy's word, and the operator's
    fleet     what is here, as those three see it
    log       the decision log: what was told, what was decided, and whether it would be decided again

What a loop owes its scheduler: one caller, in order; `now` from one clock that never goes back; every action carried out in
the order given; no message of a connection that has ended. A `WakeAt` replaces the one before it. A request id names one
attempt: a front-end that brings a request again gives the new attempt another id.
"""
