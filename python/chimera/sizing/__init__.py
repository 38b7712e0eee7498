"""How many GPUs a load needs: the question of `chimera plan`, answered by simulation.

    layout     how a model is split over GPUs, and a placement that knows the load
    load       days like the trace, as long as it takes to tell counts apart
    search     the fewest GPUs that keep the target on every one of several days
    weakness   how much more load the answer carries, and what breaks then
    answer     one line of the plan, as it is told and written
    page       the plots

Knows models, traces and cost tables as values; reads no file and prints nothing. The days are drawn from the trace by seeds,
so the same question has the same answer.
"""
