"""Why a figure of the paper and ours differ, by a part of the experiment's name; the first that fits is told."""

from __future__ import annotations

_NOT_SHORT = (
    "The eight weigh 84 of 152 GB with their engines, so memory is not what breaks first here: engines that take turns on a "
    "GPU are, and those slow every system alike"
)
_COLD = (
    "A cold start takes at least 0.35 s, and small models promise a first token in a tenth of that, so whoever loads for a "
    "request has missed it at any rate; the paper's start sooner, or promise less"
)
_KNOWS = "Our stand-in knows the rates of the whole trace beforehand and never has to guess; theirs adapts"
WHY: dict[str, str] = {
    "over s-partition's": _NOT_SHORT,
    "over muxserve-like's": f"{_NOT_SHORT}. {_KNOWS}",
    "over serverless-like's": _COLD,
    "over qlm-like's": _COLD,
    "over the worst baseline's": "The worst has one model on a GPU at a time, and every cold start misses a tight promise",
    "TPOT attainment of flexible over the best baseline's": (
        "No more of its engines are at work at once than a tight TPOT bears; where all are, as with the others, nobody keeps it"
    ),
    "over the best baseline's": f"{_NOT_SHORT}; with tight promises nobody keeps them, with loose ones all do",
    "load A: GPUs of s-partition": "18 models leave 127 of 304 GB to caches on 4 GPUs: equal parts of that are often enough",
    "load A: GPUs of muxserve-like": f"{_KNOWS}; and memory is not short on 4 GPUs",
    "load A: GPUs of serverless-like": _COLD,
    "load A: GPUs of qlm-like": _COLD,
    "load A: GPUs of flexible": "The load is by definition what kvpr holds on the paper's count",
    "load B: GPUs of kvpr": (
        "More than one engine of the busiest model can carry, and kvpr has one replica of each model: more GPUs do not help. "
        "The paper's baselines give up sooner, so its load is lower"
    ),
    "load B: GPUs of flexible": "It gives the busiest model as many replicas as that takes",
    "idle threshold": (
        "Where all that are asked for fit (Hyperbolic-like) nobody has to leave. Where not (Arena), 45 s sends off who "
        "is asked for again soon, as less does; here only 80 s and more is past that"
    ),
    "window": "With moves as rare as they have to be, the window hardly decides one",
    "58 models: GPUs of muxserve-like": (
        "The load is what it holds on 32, and no more than that is held on any number, since each model has one engine; so "
        "fewer GPUs do for it as well"
    ),
    "58 models: GPUs of kvpr": (
        "Below this the busiest model, a 1B, misses every fourth promise: it shares a GPU where memory is plenty and time is "
        "not, which KV pressure does not see"
    ),
    "58 models: GPUs of flexible": "Less than half of the 58 are asked for, as in the paper, and those fit on half of 32",
}
