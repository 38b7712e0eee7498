"""4. What a pool's layout costs the kernels that read and write it.

Decides the default layout. *Per layer* keeps every layer's keys together: plain reads, but a stripe is 2 × layers pieces of
memory. *Interleaved* keeps a token's whole cache together: a stripe is one piece, but a layer's rows lie a stride apart.
*Striped* wants both: a stripe is one piece in which a layer's rows are neighbours; slot numbers jump where a stripe ends.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from benchmark.gpu.answer import Answer
from benchmark.gpu.device import Device, device

GIB = 1 << 30
STRIPE_BYTES = 64 << 20
L2_FLUSH_BYTES = GIB
"""One timed sweep reads at least this much, so that it never finds its rows in the cache from the sweep before."""

Attend = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]
"""(queries [batch, heads, dim], keys, values [slots, heads, dim], slots [batch, context]) → [batch, heads, dim]"""
Store = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor], object]
"""(new [2, tokens, heads, dim], keys, values, slots)"""


@dataclass(frozen=True, slots=True, kw_only=True)
class Shape:
    """A Llama-3-8B's cache, or less of one."""

    layers: int
    kv_heads: int
    query_heads: int
    dim: int
    slots: int

    @property
    def row(self) -> int:
        return self.kv_heads * self.dim

    @property
    def slot_bytes(self) -> int:
        return self.layers * 2 * self.row * 2


@dataclass(frozen=True, slots=True, kw_only=True)
class Pool:
    """Each layer's keys and values as strided views, and the numbers that a slot has in them."""

    layers: list[tuple[torch.Tensor, torch.Tensor]]
    number: Callable[[torch.Tensor], torch.Tensor]


def per_layer(memory: torch.Tensor, shape: Shape) -> Pool:
    rows = memory.view(shape.layers, 2, shape.slots, shape.kv_heads, shape.dim)
    return Pool(layers=[(rows[layer, 0], rows[layer, 1]) for layer in range(shape.layers)], number=lambda slots: slots)


def interleaved(memory: torch.Tensor, shape: Shape) -> Pool:
    rows = memory.view(shape.slots, shape.layers, 2, shape.kv_heads, shape.dim)
    return Pool(layers=[(rows[:, layer, 0], rows[:, layer, 1]) for layer in range(shape.layers)], number=lambda slots: slots)


def striped(memory: torch.Tensor, shape: Shape) -> Pool:
    """A stripe is [layers, 2, tokens, heads, dim]; seen in rows of one layer, the next stripe begins layers × 2 × tokens on."""
    tokens = min(STRIPE_BYTES // shape.slot_bytes, shape.slots)
    step = shape.layers * 2 * tokens
    last = (shape.slots // tokens - 1) * step + tokens

    def view(part: int) -> torch.Tensor:
        return memory.as_strided((last, shape.kv_heads, shape.dim), (shape.row, shape.dim, 1), part * tokens * shape.row)

    return Pool(
        layers=[(view(2 * layer), view(2 * layer + 1)) for layer in range(shape.layers)],
        number=lambda slots: slots // tokens * step + slots % tokens,
    )


LAYOUTS = {"per layer": per_layer, "interleaved": interleaved, "striped": striped}


def answer(answer: Answer, *, rehearse: bool) -> None:
    where = device(rehearse=rehearse)
    shape = Shape(layers=32, kv_heads=8, query_heads=32, dim=128, slots=512 * 1024)
    batches, contexts, writes = (1, 16, 128), (512, 8192), (1, 16, 128, 8192)
    if rehearse:
        shape = Shape(layers=2, kv_heads=2, query_heads=4, dim=16, slots=1024)
        batches, contexts, writes = (1, 4), (16, 128), (1, 16)
    readers = attention(answer, rehearse=rehearse)
    stores = storing(answer, rehearse=rehearse)
    small = dataclasses.replace(shape, slots=1024)
    readers = {name: attend for name, attend in readers.items() if agrees(answer, where, small, name, attend)}

    while shape.slots * shape.slot_bytes > where.free_bytes() * 0.6:
        shape = dataclasses.replace(shape, slots=shape.slots // 2)
    memory = torch.empty(shape.slots * shape.layers * 2 * shape.row, dtype=torch.bfloat16, device=where.torch).normal_()
    answer.figure("pool", memory.numel() * 2 / GIB, "GiB")
    pools = {name: arrange(memory, shape) for name, arrange in LAYOUTS.items()}
    for batch in batches:
        for context in contexts:
            for order in ("consecutive", "scattered"):
                for name, attend in readers.items():
                    label = f"{name}, batch {batch}, context {context}, {order} slots"
                    read(answer, where, shape, pools, attend, (batch, context, order), label)
    for tokens in writes:
        for name, store in stores.items():
            write(answer, where, shape, pools, store, tokens, f"{name}, {tokens} tokens")


def choose(shape: Shape, batch: int, context: int, order: str, place: torch.device) -> torch.Tensor:
    """The slots of a batch: each request's own run of neighbours, or anything anywhere."""
    if order == "consecutive":
        first = torch.randint(max(1, shape.slots - context), (batch, 1), device=place)
        return first + torch.arange(context, device=place)
    return torch.randint(shape.slots, (batch, context), device=place)


def read(
    answer: Answer, where: Device, shape: Shape, pools: dict[str, Pool], attend: Attend, cell: tuple[int, int, str], label: str
) -> None:
    """One decode step's attention through all layers, by each layout."""
    batch, context, _ = cell
    step_bytes = batch * context * shape.slot_bytes
    sweeps = [choose(shape, *cell, where.torch) for _ in range(min(8, math.ceil(L2_FLUSH_BYTES / step_bytes)))]
    queries = torch.randn(batch, shape.query_heads, shape.dim, dtype=torch.bfloat16, device=where.torch)
    best: dict[str, float] = {}
    for name, pool in pools.items():
        tables = [pool.number(slots) for slots in sweeps]

        def work(pool: Pool = pool, tables: Sequence[torch.Tensor] = tables) -> None:
            for slots in tables:
                for keys, values in pool.layers:
                    attend(queries, keys, values, slots)

        seconds = [s / len(tables) for s in where.seconds(where.captured(work), 7)]
        answer.samples(f"attention, {name}: {label}", [step_bytes / 1e9 / s for s in seconds], "GB/s")
        best[name] = min(seconds)
    for name in best:
        if name != "per layer":
            answer.figure(f"attention, {name} against per layer: {label}", best["per layer"] / best[name], "×")


def write(answer: Answer, where: Device, shape: Shape, pools: dict[str, Pool], store: Store, tokens: int, label: str) -> None:
    """The new rows of some tokens into all layers, by each layout; no slot twice."""
    chosen = torch.randperm(shape.slots, device=where.torch)[:tokens]
    new = torch.randn(2, tokens, shape.kv_heads, shape.dim, dtype=torch.bfloat16, device=where.torch)
    best: dict[str, float] = {}
    for name, pool in pools.items():
        slots = pool.number(chosen)

        def work(pool: Pool = pool, slots: torch.Tensor = slots) -> None:
            for keys, values in pool.layers:
                store(new, keys, values, slots)

        seconds = where.seconds(where.captured(work), 20)
        answer.samples(f"store, {name}: {label}", [tokens * shape.slot_bytes / 1e9 / s for s in seconds], "GB/s")
        best[name] = min(seconds)
    for name in best:
        if name != "per layer":
            answer.figure(f"store, {name} against per layer: {label}", best["per layer"] / best[name], "×")


def plain_attention(queries: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, slots: torch.Tensor) -> torch.Tensor:
    """What the kernels must agree with."""
    batch, heads, dim = queries.shape
    rows, kv_heads = keys[slots].float(), keys.shape[1]
    grouped = queries.float().view(batch, kv_heads, heads // kv_heads, dim)
    scores = torch.einsum("bkgd,btkd->bkgt", grouped, rows) / math.sqrt(dim)
    mixed = torch.einsum("bkgt,btkd->bkgd", scores.softmax(-1), values[slots].float())
    return mixed.reshape(batch, heads, dim).to(queries.dtype)


def agrees(answer: Answer, where: Device, shape: Shape, name: str, attend: Attend) -> bool:
    """Whether a kernel, through each layout, gives what plain arithmetic gives."""
    memory = torch.randn(shape.slots * shape.layers * 2 * shape.row, dtype=torch.bfloat16, device=where.torch)
    queries = torch.randn(3, shape.query_heads, shape.dim, dtype=torch.bfloat16, device=where.torch)
    slots = choose(shape, 3, 300, "scattered", where.torch)
    worst = 0.0
    try:
        for arrange in LAYOUTS.values():
            pool = arrange(memory, shape)
            numbers = pool.number(slots)
            for keys, values in (pool.layers[0], pool.layers[-1]):
                wanted = plain_attention(queries, keys, values, numbers).float()
                given = attend(queries, keys, values, numbers).float()
                worst = max(worst, ((given - wanted).norm() / wanted.norm()).item())
    except Exception as error:  # noqa: BLE001 - a kernel that does not compile here is an answer; the others go on
        answer.fact(f"attention by {name}", f"{type(error).__name__}: {error}"[:500])
        return False
    answer.figure(f"attention by {name}, error against plain arithmetic", worst, "")
    return worst < 0.02


def attention(answer: Answer, *, rehearse: bool) -> dict[str, Attend]:
    """The kernels at hand: one of our own, and SGLang's, which is what will run."""
    if rehearse:
        return {"plain": plain_attention}
    from benchmark.gpu.split_decode import attend

    readers: dict[str, Attend] = {"split decode": attend}
    try:
        from sglang.kernels.ops.attention.decode_attention import decode_attention_fwd
    except Exception as error:  # noqa: BLE001 - an import of SGLang runs half of it; without it our own kernel answers
        answer.fact("attention by SGLang", f"{type(error).__name__}: {error}"[:500])
        return readers

    def of_sglang(queries: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, slots: torch.Tensor) -> torch.Tensor:
        batch, context = slots.shape
        splits = max(1, min(32, context // 128))
        partial = torch.empty(batch, queries.shape[1], splits, queries.shape[2], dtype=torch.float32, device=queries.device)
        starts = torch.arange(0, (batch + 1) * context, context, dtype=torch.int32, device=queries.device)
        counts = torch.full((batch,), splits, dtype=torch.int32, device=queries.device)
        out = torch.empty_like(queries)
        decode_attention_fwd(
            queries, keys, values, out, starts, slots.view(-1), partial, partial[..., 0].contiguous(), counts, splits,
            1 / math.sqrt(queries.shape[2]), 1.0, 1.0,
        )  # fmt: skip
        return out

    return {**readers, "SGLang": of_sglang}


def storing(answer: Answer, *, rehearse: bool) -> dict[str, Store]:
    """Torch's own, and SGLang's."""

    def of_torch(new: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, slots: torch.Tensor) -> None:
        keys.index_copy_(0, slots, new[0])
        values.index_copy_(0, slots, new[1])

    stores: dict[str, Store] = {"index_copy_": of_torch}
    if rehearse:
        return stores
    try:
        from sglang.jit_kernel.kvcache import can_use_store_cache, store_cache

        if not can_use_store_cache(2048):
            raise RuntimeError("its kernel does not compile here")
    except Exception as error:  # noqa: BLE001 - as above
        answer.fact("store by SGLang", f"{type(error).__name__}: {error}"[:500])
        return stores

    def of_sglang(new: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, slots: torch.Tensor) -> None:
        rows = new.flatten(2)
        store_cache(rows[0], rows[1], keys.flatten(1), values.flatten(1), slots)

    return {**stores, "SGLang": of_sglang}
