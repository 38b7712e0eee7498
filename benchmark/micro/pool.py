"""What the elastic pool costs: handing out slots against stock SGLang's allocators, and recalling half of a full prefix cache.

Slots: both allocators are filled to three quarters, holes are freed at random, and then pieces are freed and taken again,
ours and stock in turns of the same run; every ordering of our free list falls inside the time. With blocks of 16, whole
requests are extended (against `alloc_extend_naive`, what stock SGLang has where Triton is not) and freed. On a GPU the same,
with PyTorch told to refuse whatever waits for the device.

Recall: random traffic (shared prompts, continued conversations, splits, batches that decode in step, so that their slots
interleave) runs until the pool is full for the first time, or has been turned over by eviction several times. Then half of
the stripes are recalled, once by evicting the least recently used and moving what stays, once by evicting every prefix in
the way, and the tokens evicted are set against the tokens given back. What was cached is then read back from the tensors.
"""

from __future__ import annotations

import argparse
import heapq
import random
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).parents[2]))  # run as a script: the repository is not a package

from chimera import standins
from chimera.kv.budget import Budget
from chimera.kv.layout import Interleaved, KvKind
from chimera.kv.pool import ElasticPool
from chimera.kv.reserve import Reserve
from chimera.kv.slots import SlotAllocator, blocks_to_extend
from chimera.kv.victims import emptiest
from chimera.units import KIB, MIB
from chimera.vmm.host import HostDriver

from benchmark.report import Figures, parser, percentile

SLOTS_PER_STRIPE = 512
POOLS = (8 << 10, 64 << 10, 512 << 10)
BATCHES = (1, 16, 64, 256)
BLOCK = 16
GOAL = 1.2
ORDERINGS = 3
"""Of our free list, at the least, in the rounds of one figure."""


def main() -> int:
    options = parser(__doc__)
    options.add_argument("--rounds", type=int, default=15, help="turns of ours and stock for each figure")
    options.add_argument("--only", choices=["slots", "blocks", "recall"], help="one part only")
    arguments = options.parse_args()
    torch.set_num_threads(1)
    figures = Figures("elastic pool: slots and recall", seed=arguments.seed, facts={"torch": torch.__version__})
    devices = ["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"]
    if arguments.only != "recall":
        stock = import_stock(figures)
        for device in devices:
            if arguments.only != "blocks":
                measure_slots(figures, stock, device, arguments)
            if arguments.only != "slots":
                measure_blocks(figures, stock, device, arguments)
    if arguments.only in (None, "recall"):
        measure_recall(figures, arguments)
    return figures.finish(arguments.json)


def import_stock(figures: Figures) -> Any:
    standins.install()
    import sglang
    from sglang.srt.mem_cache import allocator

    print(f"# sglang: {sglang.__version__}")
    figures.circumstances["sglang"] = sglang.__version__
    return allocator


# Slots and blocks against stock.


def measure_slots(figures: Figures, stock: Any, device: str, arguments: argparse.Namespace) -> None:
    for slots in POOLS:
        for batch in BATCHES:
            ours = elastic(slots, 1, device)
            theirs = stock.TokenToKVPoolAllocator(slots - 1, torch.float16, device, None, False)
            turns = {}
            for name, allocator in (("ours", ours), ("stock", theirs)):
                rng = random.Random(arguments.seed)
                fragment(allocator, 64, rng)
                turns[name] = churn(allocator.alloc, allocator.free, batch)
            compare(
                figures,
                f"{device} slots {slots >> 10}k batch {batch}",
                turns,
                rounds=arguments.rounds,
                device=device,
                frees=1,
                calls_between_orderings=ours.calls_between_orderings,
            )


def measure_blocks(figures: Figures, stock: Any, device: str, arguments: argparse.Namespace) -> None:
    for slots in POOLS:
        for batch in BATCHES:
            ours = elastic(slots, BLOCK, device)
            theirs = stock.PagedTokenToKVPoolAllocator(slots - BLOCK, BLOCK, torch.float16, device, None, False)
            rng = random.Random(arguments.seed)
            lengths = [rng.randrange(1, max(2, min(64, slots // batch // 4))) for _ in range(batch)]
            turns = {}
            for allocator in (ours, theirs):
                fragment(allocator, 4 * BLOCK, random.Random(arguments.seed))
            turns["ours"] = extend_and_free(lambda *a, ours=ours: extend_ours(ours, *a), ours.free, lengths, device)
            turns["stock"] = extend_and_free(
                lambda *a, theirs=theirs: extend_stock(stock, theirs, *a),
                lambda row, theirs=theirs: theirs.free_segment(row, start_pos=0),
                lengths,
                device,
            )
            compare(
                figures,
                f"{device} blocks of {BLOCK} {slots >> 10}k batch {batch}",
                turns,
                rounds=arguments.rounds,
                device=device,
                frees=batch,
                calls_between_orderings=ours.calls_between_orderings,
            )


def elastic(slots: int, block: int, device: str) -> SlotAllocator:
    stripes = slots // SLOTS_PER_STRIPE
    allocator = SlotAllocator(stripes=stripes, slots_per_stripe=SLOTS_PER_STRIPE, block_slots=block, device=device)
    allocator.add(range(stripes))
    return allocator


def fragment(allocator: Any, piece: int, rng: random.Random) -> None:
    """Full, then half of it freed in random order: the free list is scattered over everything."""
    held = []
    while (taken := allocator.alloc(piece)) is not None:
        held.append(taken)
    rng.shuffle(held)
    for taken in held[len(held) // 2 :]:
        allocator.free(taken)


def churn(alloc: Callable[[int], Any], free: Callable[[Any], None], batch: int) -> Callable[[int], None]:
    live = [alloc(batch) for _ in range(8)]

    def run(pairs: int) -> None:
        for pair in range(pairs):
            free(live[pair % 8])
            live[pair % 8] = alloc(batch)

    return run


def extend_and_free(
    extend: Callable[..., torch.Tensor], free: Callable[[torch.Tensor], None], lengths: list[int], device: str
) -> Callable[[int], None]:
    """Requests of these lengths come, all in one batch, and go one by one."""
    on_host = torch.tensor(lengths)
    zeros_on_host = torch.zeros_like(on_host)
    seq, prefix = on_host.to(device), zeros_on_host.to(device)
    last = prefix - 1
    total = sum(lengths)

    def run(pairs: int) -> None:
        for _ in range(pairs):
            taken = extend(prefix, zeros_on_host, seq, on_host, last, total)
            for row in taken.split(lengths):
                free(row)

    return run


def extend_ours(
    allocator: SlotAllocator,
    prefix: torch.Tensor,
    prefix_on_host: torch.Tensor,
    seq: torch.Tensor,
    seq_on_host: torch.Tensor,
    last: torch.Tensor,
    total: int,
) -> torch.Tensor:
    new_blocks = blocks_to_extend(prefix_on_host, seq_on_host, BLOCK)
    taken = allocator.alloc_extend(prefix, seq, last, new_tokens=total, new_blocks=new_blocks)
    assert taken is not None
    return taken


def extend_stock(
    stock: Any,
    allocator: Any,
    prefix: torch.Tensor,
    prefix_on_host: torch.Tensor,
    seq: torch.Tensor,
    seq_on_host: torch.Tensor,
    last: torch.Tensor,
    total: int,
) -> torch.Tensor:
    """The body of stock's `alloc_extend`, with its plain PyTorch function in place of its Triton kernel."""
    from sglang.srt.mem_cache.allocator.paged import get_num_new_pages

    out = torch.empty((total,), dtype=torch.int64, device=allocator.device)
    stock.alloc_extend_naive(prefix, seq, last, allocator.free_pages, out, BLOCK, allocator.device)
    new = get_num_new_pages(seq_lens=seq_on_host, page_size=BLOCK, prefix_lens=prefix_on_host)
    assert new <= len(allocator.free_pages)
    allocator.free_pages = allocator.free_pages[new:]
    return out


def compare(
    figures: Figures,
    name: str,
    turns: dict[str, Callable[[int], None]],
    *,
    rounds: int,
    device: str,
    frees: int,
    calls_between_orderings: int,
) -> None:
    """Microseconds of each, and the ratio of turns that follow one another."""
    pairs = pairs_for(turns["stock"], device, ORDERINGS * calls_between_orderings // rounds // frees + 1)
    turns["ours"](pairs)
    took: dict[str, list[float]] = {"ours": [], "stock": []}
    for turn in range(rounds):
        for which in ("ours", "stock") if turn % 2 else ("stock", "ours"):
            with refusing_to_wait(device if which == "ours" else "cpu"):
                took[which].append(timed(lambda which=which: turns[which](pairs), device) / pairs * 1e6)
    ratios = [ours / theirs for ours, theirs in zip(took["ours"], took["stock"], strict=True)]
    figures.samples(f"{name}: ours", took["ours"], "µs a pair")
    figures.samples(f"{name}: stock", took["stock"], "µs a pair")
    # Of the sums, not the median of ratios: an ordering falls into few rounds, and is to be paid for.
    ratio = sum(took["ours"]) / sum(took["stock"])
    figures.add(f"{name}: ratio", ratio, "×", at_most=GOAL, spread=(percentile(ratios, 10), percentile(ratios, 90)))


def pairs_for(stock: Callable[[int], None], device: str, fewest: int) -> int:
    """As many as take stock some 10 ms."""
    stock(3)
    return max(fewest, int(0.01 / (timed(lambda: stock(3), device) / 3)))


def timed(act: Callable[[], None], device: str) -> float:
    """On a CPU the thread's own time: what else runs on the machine is not counted."""
    if device == "cpu":
        begin = time.thread_time()
        act()
        return time.thread_time() - begin
    begin = time.perf_counter()
    act()
    torch.cuda.synchronize()
    return time.perf_counter() - begin


@contextmanager
def refusing_to_wait(device: str) -> Iterator[None]:
    if device != "cuda":
        yield
        return
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


# Recall.

RECALL_SLOTS = 64 << 10
KIND = KvKind.heads(layers=2, kv_heads=2, head_dim=64, dtype=torch.float32)


class Prefix:
    __slots__ = ("children", "parent", "slots", "used_at")

    def __init__(self, slots: list[int], parent: Prefix | None, used_at: int) -> None:
        self.slots = slots
        self.parent = parent
        self.children: set[Prefix] = set()
        self.used_at = used_at
        if parent is not None:
            parent.children.add(self)


class Cache:
    """A radix tree as SGLang keeps it: leaves are evicted, the longest unused first; a prefix used in part is split."""

    def __init__(self, pool: ElasticPool) -> None:
        self.pool = pool
        self.marks = pool.tensors()["k"][1][:, 0, 0]
        self.root = Prefix([], None, 0)
        self.prefixes: list[Prefix] = []
        self.written: dict[int, float] = {}
        self.evicted_tokens = 0

    def add(self, slots: list[int], parent: Prefix, now: int) -> Prefix:
        prefix = Prefix(slots, parent, now)
        self.prefixes.append(prefix)
        return prefix

    def split(self, prefix: Prefix, at: int) -> Prefix:
        """The first `at` tokens become a prefix of their own."""
        assert prefix.parent is not None
        prefix.parent.children.remove(prefix)
        head = self.add(prefix.slots[:at], prefix.parent, prefix.used_at)
        prefix.slots, prefix.parent = prefix.slots[at:], head
        head.children.add(prefix)
        return head

    def evict(self, enough: Callable[[], bool], locked: set[Prefix]) -> None:
        leaves = [(p.used_at, id(p), p) for p in self.prefixes if not p.children and p not in locked]
        heapq.heapify(leaves)
        while leaves and not enough():
            prefix = heapq.heappop(leaves)[2]
            parent = self.drop(prefix)
            if parent is not self.root and not parent.children and parent not in locked:
                heapq.heappush(leaves, (parent.used_at, id(parent), parent))

    def drop(self, prefix: Prefix) -> Prefix:
        assert prefix.parent is not None
        self.pool.slots.free(torch.tensor(prefix.slots))
        self.evicted_tokens += len(prefix.slots)
        self.prefixes.remove(prefix)
        prefix.parent.children.remove(prefix)
        return prefix.parent

    def all_slots(self) -> torch.Tensor:
        return torch.tensor([slot for prefix in self.prefixes for slot in prefix.slots])

    def write(self, slots: torch.Tensor) -> None:
        values = torch.rand(len(slots))
        self.marks[slots] = values
        self.written.update(zip(slots.tolist(), values.tolist(), strict=True))


class Traffic:
    """Requests that come, share, decode in step and are cached."""

    RUNNING = 24
    CHUNK = 512

    def __init__(self, cache: Cache, seed: int) -> None:
        self.cache = cache
        self.rng = random.Random(seed)
        self.running: list[list[Any]] = []
        self.now = 0

    def run(self, until: Callable[[], bool]) -> None:
        while not until():
            self.now += 1
            while len(self.running) < self.RUNNING and self.rng.random() < 0.5:
                self.arrive()
            self.step()
        # Who is still running is cached as far as it got: the pool stays full, and nothing is locked.
        for parent, slots, _, _ in self.running:
            if slots:
                self.cache.add(slots, parent, self.now)
        self.running = []

    def arrive(self) -> None:
        """New, or a continuation of something cached, or of a part of it."""
        rng, parent = self.rng, self.cache.root
        if self.cache.prefixes and rng.random() < 0.75:
            parent = rng.choice(self.cache.prefixes)
            if len(parent.slots) > 20 and rng.random() < 0.3:
                parent = self.cache.split(parent, rng.randrange(5, len(parent.slots) - 5))
        for prefix in lineage(parent):
            prefix.used_at = self.now
        prompt = min(4000, int(rng.lognormvariate(5.3, 0.9)) + 8)
        answer = min(1500, int(rng.lognormvariate(4.7, 0.8)) + 4)
        self.running.append([parent, [], prompt, answer])

    def step(self) -> None:
        budget = self.CHUNK
        decoding = []
        for request in self.running:
            if request[2] == 0:
                decoding.append(request)
            elif budget:
                chunk = self.take(min(request[2], budget))
                request[1] += chunk
                request[2] -= len(chunk)
                budget -= len(chunk)
        # In this loop the slots of a batch interleave: one each, every step.
        for request, slot in zip(decoding, self.take(len(decoding)), strict=False):
            request[1].append(slot)
            request[3] -= 1
        for request in [r for r in self.running if r[2] == 0 and r[3] <= 0]:
            self.running.remove(request)
            self.cache.add(request[1], request[0], self.now)

    def take(self, count: int) -> list[int]:
        slots = self.cache.pool.slots
        if slots.available < count:
            locked = {prefix for request in self.running for prefix in lineage(request[0])}
            self.cache.evict(lambda: slots.available >= count, locked)
        taken = slots.alloc(min(count, slots.available))
        assert taken is not None
        self.cache.write(taken)
        return list(taken.tolist())


def lineage(prefix: Prefix) -> Iterator[Prefix]:
    while prefix.parent is not None:
        yield prefix
        prefix = prefix.parent


def measure_recall(figures: Figures, arguments: argparse.Namespace) -> None:
    """The tokens evicted for each token given back; more than 1 means that more was lost than was asked for."""
    seeds = range(arguments.seed, arguments.seed + 7)
    for state, turnovers in (("filled once", 0), ("turned over 4 times", 4)):
        moving = [recall_by_moving(full_cache(seed, turnovers)) for seed in seeds]
        evicting = [recall_by_evicting(full_cache(seed, turnovers)) for seed in seeds]
        figures.samples(f"recall half, {state}: moved, evicted per given", [m[0] for m in moving], "×", at_most=1.3)
        figures.samples(f"recall half, {state}: moved, moved per given", [m[1] for m in moving], "×")
        figures.samples(f"recall half, {state}: moved, time of the move", [m[2] * 1e3 for m in moving], "ms")
        figures.samples(f"recall half, {state}: not moved, evicted per given", evicting, "×")


def full_cache(seed: int, turnovers: int) -> Cache:
    layout = Interleaved(KIND, slots=RECALL_SLOTS, granularity=64 * KIB, stripe_bytes=MIB)
    assert layout.slots_per_stripe == SLOTS_PER_STRIPE
    reserve = Reserve(HostDriver(64 * KIB), handle_bytes=layout.handle_bytes, budget=Budget(layout.range_bytes))
    pool = ElasticPool(layout, reserve)
    pool.grow(layout.stripes)
    cache = Cache(pool)
    traffic = Traffic(cache, seed)
    traffic.run(lambda: pool.slots.available < Traffic.CHUNK and cache.evicted_tokens >= turnovers * RECALL_SLOTS)
    cache.evicted_tokens = 0
    return cache


def recall(cache: Cache, clear_away: Callable[[], None]) -> int:
    """Half of the stripes leave; returns the tokens given back."""
    pool = cache.pool
    half = pool.staying_stripes // 2
    assert len(pool.shrink(half, emptiest, evictable=cache.all_slots())) == half
    clear_away()
    assert pool.tick() == half
    for prefix in cache.prefixes:
        read = cache.marks[torch.tensor(prefix.slots)].tolist()
        assert read == [cache.written[slot] for slot in prefix.slots], "what stays is what was written"
    pool.close()
    pool.reserve.close()
    pool.reserve.driver.close()
    return half * SLOTS_PER_STRIPE


def recall_by_moving(cache: Cache) -> tuple[float, float, float]:
    """Evict the least recently used wherever it lies, until what remains fits; move that out of the way."""
    slots = cache.pool.slots
    moved_tokens = 0
    took_s = 0.0

    def fits() -> bool:
        slots.settle()
        in_the_way = len(slots.leaving) * SLOTS_PER_STRIPE - slots.withheld
        return slots.available >= in_the_way

    def clear_away() -> None:
        nonlocal moved_tokens, took_s
        cache.evict(fits, set())
        begin = time.perf_counter()
        everything = cache.all_slots()
        leaving = slots.on_leaving(everything)
        here = everything[leaving]
        there = cache.pool.move(here)
        took_s = time.perf_counter() - begin
        assert there is not None
        everything[leaving] = there
        for prefix, row in zip(cache.prefixes, everything.split([len(p.slots) for p in cache.prefixes]), strict=True):
            prefix.slots = row.tolist()
        was = [cache.written[slot] for slot in here.tolist()]
        cache.written.update(zip(there.tolist(), was, strict=True))
        moved_tokens = len(here)

    given = recall(cache, clear_away)
    return cache.evicted_tokens / given, moved_tokens / given, took_s


def recall_by_evicting(cache: Cache) -> float:
    """What it would cost not to move: every prefix in the way goes, and with it all that continue it."""

    def clear_away() -> None:
        in_the_way = {p for p in cache.prefixes if bool(cache.pool.slots.on_leaving(torch.tensor(p.slots)).any())}
        goes = [p for p in cache.prefixes if any(a in in_the_way for a in lineage(p))]
        for prefix in goes:
            cache.drop(prefix)

    given = recall(cache, clear_away)
    return cache.evicted_tokens / given


if __name__ == "__main__":
    sys.exit(main())
