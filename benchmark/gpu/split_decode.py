"""Decode attention over scattered slots as one Triton kernel, small enough to be sure of: what layouts are compared by.

Keys and values are [slots, heads, dim] with any stride between slots. Each program reads one part of one request's slots for
one key head; the parts are put together by plain arithmetic, which costs little and the same in every layout.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl

PROGRAMS = 1024
"""About eight for each multiprocessor of an H200."""
LEAST_PART = 128


@triton.jit
def _part(
    queries, keys, values, slots, mixed, peaks, sums, scale, context, slot_stride, head_stride,
    PART: tl.constexpr, GROUP: tl.constexpr, ROWS: tl.constexpr, DIM: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    request, head, part = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    heads, parts = tl.num_programs(1), tl.num_programs(2)
    row, dim, token = tl.arange(0, ROWS), tl.arange(0, DIM), tl.arange(0, BLOCK)
    wanted = row < GROUP
    first = (request * heads + head) * GROUP
    query = tl.load(queries + (first + row)[:, None] * DIM + dim[None, :], mask=wanted[:, None], other=0.0)
    peak = tl.full([ROWS], float("-inf"), tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    mix = tl.zeros([ROWS, DIM], tl.float32)
    for step in range(0, PART, BLOCK):
        begin = part * PART + step
        inside = begin + token < context
        slot = tl.load(slots + request * context + begin + token, mask=inside, other=0).to(tl.int64)
        at = slot * slot_stride + head * head_stride
        key = tl.load(keys + at[None, :] + dim[:, None], mask=inside[None, :], other=0.0)
        score = tl.dot(query, key).to(tl.float32) * scale
        score = tl.where(inside[None, :], score, float("-inf"))
        higher = tl.maximum(peak, tl.max(score, 1))
        weight = tl.exp(score - higher[:, None])
        fade = tl.exp(peak - higher)
        value = tl.load(values + at[:, None] + dim[None, :], mask=inside[:, None], other=0.0)
        mix = mix * fade[:, None] + tl.dot(weight.to(value.dtype), value)
        total = total * fade + tl.sum(weight, 1)
        peak = higher
    into = (first + row) * parts + part
    tl.store(mixed + into[:, None] * DIM + dim[None, :], mix, mask=wanted[:, None])
    tl.store(peaks + into, peak, mask=wanted)
    tl.store(sums + into, total, mask=wanted)


def attend(queries: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, slots: torch.Tensor) -> torch.Tensor:
    """The attention of one new token per request: `slots` [batch, context] names its rows in `keys` and `values`."""
    (batch, heads, dim), (_, context), kv_heads = queries.shape, slots.shape, keys.shape[1]
    wished = max(1, min(PROGRAMS // (batch * kv_heads), context // LEAST_PART))
    part = triton.next_power_of_2(max(LEAST_PART, math.ceil(context / wished)))
    parts = math.ceil(context / part)
    mixed = torch.empty(batch, heads, parts, dim, dtype=torch.float32, device=queries.device)
    peaks, sums = torch.empty(2, batch, heads, parts, dtype=torch.float32, device=queries.device).unbind()
    _part[(batch, kv_heads, parts)](
        queries, keys, values, slots, mixed, peaks, sums, 1 / math.sqrt(dim), context, keys.stride(0), keys.stride(1),
        PART=part, GROUP=heads // kv_heads, ROWS=16, DIM=dim, BLOCK=64, num_warps=4, num_stages=3,
    )  # fmt: skip
    share = torch.exp(peaks - peaks.amax(-1, keepdim=True))
    weighted = (mixed * share[..., None]).sum(2) / (sums * share).sum(-1, keepdim=True)
    return weighted.to(queries.dtype)
