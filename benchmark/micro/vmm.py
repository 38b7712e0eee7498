"""What the host driver costs against the same calls in C, compiled on the spot; how soon a pool can use a grown stripe; and
how a large shrink gives memory back without holding its caller.

C and ours take turns in one run, each in a process state as like the other's as can be: the same file, the same addresses,
the same pages. Pages are touched or not as the name of a figure says: an untouched page costs only the call.
"""

from __future__ import annotations

import ctypes
import mmap
import os
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))  # run as a script: the repository is not a package

import torch
from chimera.kv.budget import Budget
from chimera.kv.layout import Interleaved, KvKind
from chimera.kv.pool import ElasticPool
from chimera.kv.reserve import Reserve
from chimera.units import GIB, MIB
from chimera.vmm.host import HostDriver

from benchmark.report import Figures, parser, percentile

PAGE = 2 * MIB
RUN = 64

C_SOURCE = r"""
#define _GNU_SOURCE
#include <fcntl.h>
#include <sys/mman.h>
#include <time.h>

#define VACANT (MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE | MAP_FIXED)

static double now(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return t.tv_sec + t.tv_nsec * 1e-9;
}

/* `step` bytes a call: a page at a time, or the whole run. */
double map_pages(char *at, int file, long bytes, long step) {
    double begin = now();
    for (long done = 0; done < bytes; done += step)
        if (mmap(at + done, step, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_FIXED, file, done) == MAP_FAILED) return -1;
    return now() - begin;
}

double unmap_pages(char *at, long bytes, long step) {
    double begin = now();
    for (long done = 0; done < bytes; done += step)
        if (mmap(at + done, step, PROT_NONE, VACANT, -1, 0) == MAP_FAILED) return -1;
    return now() - begin;
}

double punch(int file, long bytes, long step) {
    double begin = now();
    for (long done = 0; done < bytes; done += step)
        if (fallocate(file, FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE, done, step)) return -1;
    return now() - begin;
}
"""


class C:
    """The loop in C over an anonymous file and addresses of its own."""

    def __init__(self, nbytes: int) -> None:
        with tempfile.TemporaryDirectory() as folder:
            source, library = Path(folder, "loop.c"), Path(folder, "loop.so")
            source.write_text(C_SOURCE)
            subprocess.run(["cc", "-O2", "-shared", "-fPIC", "-o", library, source], check=True)
            self._loop = ctypes.CDLL(str(library))
        for name in ("map_pages", "unmap_pages", "punch"):
            getattr(self._loop, name).restype = ctypes.c_double
        self.file = os.memfd_create("loop")
        os.ftruncate(self.file, nbytes)
        # Addresses from our own driver's reservation: placed and aligned as ours are.
        self.driver = HostDriver(PAGE)
        self.address = self.driver.reserve(nbytes).address

    def map(self, nbytes: int, step: int) -> float:
        return self._told(
            self._loop.map_pages(ctypes.c_void_p(self.address), self.file, ctypes.c_long(nbytes), ctypes.c_long(step))
        )

    def unmap(self, nbytes: int, step: int) -> float:
        return self._told(self._loop.unmap_pages(ctypes.c_void_p(self.address), ctypes.c_long(nbytes), ctypes.c_long(step)))

    def punch(self, nbytes: int, step: int) -> float:
        return self._told(self._loop.punch(self.file, ctypes.c_long(nbytes), ctypes.c_long(step)))

    @staticmethod
    def _told(seconds: float) -> float:
        assert seconds >= 0, "the C loop was refused"
        return seconds


def main() -> int:
    options = parser(__doc__)
    options.add_argument("--rounds", type=int, default=300, help="turns of ours and C for the calls")
    options.add_argument("--shrinks", type=int, default=7, help="turns of ours and C for shrinking 1 GiB")
    arguments = options.parse_args()
    figures = Figures("virtual memory on the host", seed=arguments.seed, facts={"huge pages": huge_pages()})
    torch.set_num_threads(1)
    measure_calls(figures, arguments.rounds)
    measure_growing(figures, arguments.rounds)
    measure_shrinking(figures, arguments.shrinks)
    return figures.finish(arguments.json)


def huge_pages() -> str:
    path = Path("/sys/kernel/mm/transparent_hugepage/shmem_enabled")
    return path.read_text().strip() if path.exists() else "unknown"


def measure_calls(figures: Figures, rounds: int) -> None:
    """Mapping and unmapping, in C a page a call, in C the whole run in one call, and ours."""
    c = C(RUN * PAGE)
    with HostDriver(PAGE) as driver:
        where = driver.reserve(RUN * PAGE)
        handles = driver.create(PAGE, RUN)
        placements = {i * PAGE: handle for i, handle in enumerate(handles)}
        offsets = list(placements)

        def ours_run() -> float:
            return timed(lambda: driver.map(where, placements)) + timed(lambda: driver.unmap(where, offsets))

        def ours_single() -> float:
            took = 0.0
            for offset, handle in placements.items():
                single = {offset: handle}
                took += timed(lambda single=single: driver.map(where, single))
            for offset in offsets:
                took += timed(lambda offset=offset: driver.unmap(where, [offset]))
            return took

        def c_by(step: int) -> Callable[[], float]:
            return lambda: c.map(RUN * PAGE, step) + c.unmap(RUN * PAGE, step)

        took = in_turns(rounds, {"run": ours_run, "single": ours_single, "C": c_by(PAGE), "C run": c_by(RUN * PAGE)})
        for name, words in (
            ("C", "C, a page a call"),
            ("C run", "C, one call"),
            ("run", "ours"),
            ("single", "ours, a page a call"),
        ):
            figures.samples(f"map + unmap 64 × 2 MiB, untouched: {words}", [s * 1e6 for s in took[name]], "µs")
        ratio(figures, "map + unmap 64 × 2 MiB, untouched: ours / C loop", took["run"], took["C"], at_most=1.5)
        ratio(figures, "map + unmap 64 × 2 MiB, untouched: ours / C in one call", took["run"], took["C run"])
        ratio(figures, "map + unmap 2 MiB alone, untouched: ours / C", took["single"], took["C"])

        def ours_touched() -> float:
            took = timed(lambda: driver.map(where, placements))
            touch(where.address, RUN * PAGE)
            return took + timed(lambda: driver.unmap(where, offsets))

        def c_touched(step: int) -> Callable[[], float]:
            def act() -> float:
                took = c.map(RUN * PAGE, step)
                touch(c.address, RUN * PAGE)
                return took + c.unmap(RUN * PAGE, step)

            return act

        took = in_turns(max(20, rounds // 10), {"run": ours_touched, "C": c_touched(PAGE), "C run": c_touched(RUN * PAGE)})
        ratio(figures, "map + unmap 64 × 2 MiB, touched: ours / C loop", took["run"], took["C"], at_most=1.5)
        ratio(figures, "map + unmap 64 × 2 MiB, touched: ours / C in one call", took["run"], took["C run"], at_most=1.5)
    c.punch(RUN * PAGE, RUN * PAGE)


def measure_growing(figures: Figures, rounds: int) -> None:
    """From stripes that wait in the reserve to slots that can be handed out."""
    pool = pool_of(PAGE, RUN + 1, high=RUN)
    pool.reserve.start()
    pool.grow(1)
    grown_s, faults_s = [], []
    for _ in range(rounds):
        grown_s.append(timed(lambda: pool.grow(RUN)))
        assert pool.staying_stripes == RUN + 1
        if len(faults_s) < 20:
            faults_s.append(timed(lambda: touch(pool._arena.address + PAGE, RUN * PAGE)))
        pool.shrink(RUN)
        pool.tick()
        pool.reserve.settle()
        assert pool.tick() == RUN
    figures.samples("64 × 2 MiB from the reserve to usable", [s * 1e3 for s in grown_s], "ms")
    figures.add("64 × 2 MiB from the reserve to usable: p99", percentile(grown_s, 99) * 1e3, "ms", at_most=2)
    figures.samples("64 × 2 MiB: first touch of every page", [s * 1e3 for s in faults_s], "ms")
    close(pool)


def measure_shrinking(figures: Figures, rounds: int) -> None:
    """1 GiB that was touched: given back by the reserve's thread while the caller goes on; C does it in line."""
    stripe = 32 * MIB
    stripes = GIB // stripe
    pool = pool_of(stripe, stripes + 1)
    driver = pool.reserve.driver
    assert isinstance(driver, HostDriver)
    pool.reserve.start()
    pool.grow(1)
    c = C(GIB)
    ours_s, c_s, held_s, late_s, rss_left, blocks_left = [], [], [], [], [], []
    for turn in range(rounds):
        for which in ("ours", "C") if turn % 2 else ("C", "ours"):
            if which == "C":
                c.map(GIB, GIB)
                touch(c.address, GIB)
                c_s.append(c.unmap(GIB, stripe) + c.punch(GIB, stripe))
                continue
            pool.grow(stripes)
            before_rss, before_blocks = resident_bytes(), driver.file_bytes
            touch(pool._arena.address + stripe, GIB)
            grown_rss, grown_blocks = resident_bytes() - before_rss, driver.file_bytes - before_blocks
            with Heartbeat() as heartbeat:
                begin = time.perf_counter()
                held_s.append(timed(lambda: (pool.shrink(stripes), pool.tick())))
                pool.reserve.settle()
                ours_s.append(time.perf_counter() - begin)
            late_s.append(heartbeat.latest_s)
            assert pool.tick() == stripes
            rss_left.append((resident_bytes() - before_rss) / grown_rss)
            blocks_left.append((driver.file_bytes - before_blocks) / grown_blocks)
    figures.samples("shrink 1 GiB: ours", [s * 1e3 for s in ours_s], "ms")
    figures.samples("shrink 1 GiB: C", [s * 1e3 for s in c_s], "ms")
    ratio(figures, "shrink 1 GiB: ours / C", ours_s, c_s, at_most=1.3)
    figures.add("shrink 1 GiB: resident memory gone", 100 * (1 - max(rss_left)), "%", at_least=95)
    figures.add("shrink 1 GiB: file blocks gone", 100 * (1 - max(blocks_left)), "%", at_least=95)
    figures.samples("shrink 1 GiB: caller held", [s * 1e3 for s in held_s], "ms", at_most=5)
    figures.samples("shrink 1 GiB: another thread's longest wait meanwhile", [s * 1e3 for s in late_s], "ms")
    close(pool)


class Heartbeat:
    """A thread that maps and touches a page of its own every half millisecond, as an engine might; and the latest it was."""

    def __init__(self) -> None:
        self.latest_s = 0.0
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._beat)

    def _beat(self) -> None:
        while True:
            begin = time.perf_counter()
            if self._stop.wait(0.0005):
                return
            with mmap.mmap(-1, mmap.PAGESIZE) as page:
                page[0] = 1
            self.latest_s = max(self.latest_s, time.perf_counter() - begin - 0.0005)

    def __enter__(self) -> Heartbeat:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()


def pool_of(stripe_bytes: int, stripes: int, *, high: int = 0) -> ElasticPool:
    """Of tokens as an 8B Llama has them: 128 KiB."""
    kind = KvKind.heads(layers=32, kv_heads=8, head_dim=128, dtype=torch.bfloat16)
    slots = stripes * stripe_bytes // kind.token_bytes
    layout = Interleaved(kind, slots=slots, granularity=PAGE, stripe_bytes=stripe_bytes)
    assert (layout.handle_bytes, layout.stripes) == (stripe_bytes, stripes)
    budget = Budget(2 * stripes * stripe_bytes)
    return ElasticPool(layout, Reserve(HostDriver(PAGE), handle_bytes=layout.handle_bytes, budget=budget, high=high))


def close(pool: ElasticPool) -> None:
    pool.close()
    pool.reserve.close()
    pool.reserve.driver.close()


def in_turns(rounds: int, acts: dict[str, Callable[[], float]]) -> dict[str, list[float]]:
    took: dict[str, list[float]] = {name: [] for name in acts}
    for act in acts.values():
        act()
    for turn in range(rounds):
        names = list(acts)
        for name in names[turn % len(names) :] + names[: turn % len(names)]:
            took[name].append(acts[name]())
    return took


def ratio(figures: Figures, name: str, ours: list[float], c: list[float], *, at_most: float | None = None) -> None:
    """Of the medians; the spread is that of turns that follow one another."""
    turns = [a / b for a, b in zip(ours, c, strict=True)]
    value = statistics.median(ours) / statistics.median(c)
    figures.add(name, value, "×", at_most=at_most, spread=(percentile(turns, 10), percentile(turns, 90)))


def timed(act: Callable[[], object]) -> float:
    begin = time.perf_counter()
    act()
    return time.perf_counter() - begin


def touch(address: int, nbytes: int) -> None:
    ctypes.memset(address, 1, nbytes)


def resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * mmap.PAGESIZE


if __name__ == "__main__":
    sys.exit(main())
