"""2. What creating, mapping and unmapping physical memory costs.

Decides the size of a stripe (how many bytes one handle holds), whether growing must be served from a reserve of created
handles, whether shrinking may happen while the model runs, and how long after a shrink another process can count on the bytes.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmark.gpu import raw
from benchmark.gpu.answer import Answer
from benchmark.gpu.device import Device, device

MIB = 1 << 20
HANDLE_MIB = (2, 16, 32, 64)
PATIENCE_S = 20.0


def answer(answer: Answer, *, rehearse: bool) -> None:
    with tempfile.TemporaryDirectory() as folder:
        free_bytes = Path(folder, "free")
        free_bytes.write_text(f"{1 << 30:020d}")
        where = device(rehearse=rehearse)  # on a GPU this makes the context that the raw calls work in
        calls: raw.Calls = raw.Rehearsal(free_bytes) if rehearse else raw.cuda
        for recommended in (False, True):
            name = f"granularity, {'recommended' if recommended else 'minimum'}"
            answer.figure(name, raw.granularity(calls, recommended=recommended) / MIB, "MiB")
        total = (128 if rehearse else 1024) * MIB
        for handle_mib in HANDLE_MIB:
            prices(answer, calls, where, handle_mib * MIB, total, "alone")
            batched(answer, calls, handle_mib * MIB, total)
        busy_prices(answer, calls, where, total, rehearse=rehearse)
        handover(answer, calls, free_bytes, rehearse=rehearse)


def prices(answer: Answer, calls: raw.Calls, where: Device, size: int, total: int, when: str) -> None:
    """Every call of the life of a handle, one by one, for `total` bytes of handles of one size."""
    spent: dict[str, list[float]] = {call: [] for call in ("create", "map", "set access", "unmap", "release")}

    def timed(call: str, name: str, *arguments: Any) -> Any:
        begin = time.perf_counter_ns()
        value = calls(name, *arguments)
        spent[call].append((time.perf_counter_ns() - begin) / 1e3)
        return value

    wish, access = raw.on_device(), [raw.read_write()]
    base = int(calls("cuMemAddressReserve", total, size, 0, 0))
    offsets = range(0, total, size)
    handles = [timed("create", "cuMemCreate", size, wish, 0) for _ in offsets]
    for offset, handle in zip(offsets, handles, strict=True):
        timed("map", "cuMemMap", base + offset, size, 0, handle, 0)
        timed("set access", "cuMemSetAccess", base + offset, size, access, 1)
    for offset in offsets:
        timed("unmap", "cuMemUnmap", base + offset, size)
    for handle in handles:
        timed("release", "cuMemRelease", handle)
    calls("cuMemAddressFree", base, total)
    for call, microseconds in spent.items():
        answer.samples(f"{call} {size // MIB} MiB, {when}", microseconds, "µs")
    answer.figure(f"create {size // MIB} MiB, rate, {when}", total / 1e9 / (sum(spent["create"]) / 1e6), "GB/s")
    growing_s = sum(spent["map"] + spent["set access"]) / 1e6
    answer.figure(f"map and set access {size // MIB} MiB, rate, {when}", total / 1e9 / growing_s, "GB/s")


def batched(answer: Answer, calls: raw.Calls, size: int, total: int) -> None:
    """One cuMemSetAccess, and one cuMemUnmap, over neighbouring handles: what a driver that knows runs can save."""
    base = int(calls("cuMemAddressReserve", total, size, 0, 0))
    handles = [calls("cuMemCreate", size, raw.on_device(), 0) for _ in range(total // size)]
    for at, handle in enumerate(handles):
        calls("cuMemMap", base + at * size, size, 0, handle, 0)
    begin = time.perf_counter()
    calls("cuMemSetAccess", base, total, [raw.read_write()], 1)
    accessible = time.perf_counter()
    calls("cuMemUnmap", base, total)
    unmapped = time.perf_counter()
    for handle in handles:
        calls("cuMemRelease", handle)
    calls("cuMemAddressFree", base, total)
    what = f"{total // MIB} MiB of {size // MIB} MiB handles"
    answer.figure(f"set access, one call for {what}", (accessible - begin) * 1e6, "µs")
    answer.figure(f"unmap, one call for {what}", (unmapped - accessible) * 1e6, "µs")


def busy_prices(answer: Answer, calls: raw.Calls, where: Device, total: int, *, rehearse: bool) -> None:
    """The same prices while graphs run that touch other memory; and what the graphs lose by it."""
    import torch

    elements = 1 << 16 if rehearse else 1 << 29
    source = torch.ones(elements, dtype=torch.bfloat16, device=where.torch)
    sink = torch.empty_like(source)
    replay = where.captured(lambda: [sink.copy_(source) for _ in range(1 if rehearse else 64)])
    undisturbed_s = min(where.seconds(replay, 5))
    replays = 2 if rehearse else max(1, int(3.0 / undisturbed_s))

    def steps() -> None:
        for _ in range(replays):
            replay()

    for handle_mib in HANDLE_MIB:
        running = where.start(steps)
        begin = time.perf_counter()
        prices(answer, calls, where, handle_mib * MIB, total, "while a graph runs")
        called_s = time.perf_counter() - begin
        answer.fact(f"the graphs outlasted the calls, {handle_mib} MiB", not running.done())
        answer.figure(f"all calls for {total // MIB} MiB of {handle_mib} MiB while graphs run", called_s, "s")
        answer.figure(
            f"graphs beside calls of {handle_mib} MiB, against alone", running.seconds() / (undisturbed_s * replays), "×"
        )


def handover(answer: Answer, calls: raw.Calls, free_bytes: Path, *, rehearse: bool) -> None:
    """A second process takes all the memory that is left and asks for more; we unmap, then release: when does it get it?"""
    size = (64 if rehearse else 1024) * MIB
    base = int(calls("cuMemAddressReserve", size, size, 0, 0))
    handle = calls("cuMemCreate", size, raw.on_device(), 0)
    calls("cuMemMap", base, size, 0, handle, 0)
    calls("cuMemSetAccess", base, size, [raw.read_write()], 1)
    command = [sys.executable, __file__, str(size), str(free_bytes) if rehearse else ""]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as second:
        try:
            filled = _told(second)
            answer.figure(f"create {size // MIB} MiB, rate, all the rest", filled["bytes"] / 1e9 / filled["s"], "GB/s")
            if not filled["full"]:
                answer.fact("a second process gets the bytes", f"unknown: the device not full within {PATIENCE_S:.0f} s")
                return
            # Mapped by nobody, but still ours: does the second process see it?
            calls("cuMemUnmap", base, size)
            unmapped = time.monotonic()
            answer.fact("a second process gets the bytes after unmap alone", _poll(second, unmapped + 0.3) is not None)
            calls("cuMemRelease", handle)
            released = time.monotonic()
            got = _poll(second, released + PATIENCE_S)
            if got is None:
                answer.fact("a second process gets the bytes after release", f"not within {PATIENCE_S:.0f} s")
            else:
                answer.figure("release until a second process has the bytes", (got - released) * 1e3, "ms")
        finally:
            second.kill()
    calls("cuMemAddressFree", base, size)


def _told(second: subprocess.Popen[str]) -> dict[str, float]:
    assert second.stdout is not None
    line = second.stdout.readline()
    if not line:
        raise RuntimeError("the second process ended before it had told anything")
    told: dict[str, float] = json.loads(line)
    return told


def _poll(second: subprocess.Popen[str], until: float) -> float | None:
    """Lets the second process ask for the bytes until it gets them, or until that moment; when it got them."""
    assert second.stdin is not None
    second.stdin.write(f"{until}\n")
    second.stdin.flush()
    return _told(second).get("got")


def fill_and_wait(size: int, calls: raw.Calls) -> None:
    """The second process. The clock is the machine's, so moments can be compared across processes."""
    create: Callable[[], Any] = lambda: calls("cuMemCreate", size, raw.on_device(), 0)  # noqa: E731 - a call with its arguments
    begin, taken, full = time.monotonic(), 0, False
    while not full and time.monotonic() - begin < PATIENCE_S:
        try:
            create()
        except raw.Refused as refused:
            if refused.code != raw.OUT_OF_MEMORY:
                raise
            full = True
        else:
            taken += size
    print(json.dumps({"bytes": taken, "full": full, "s": time.monotonic() - begin}), flush=True)
    for line in sys.stdin:
        got = None
        while got is None and time.monotonic() < float(line):
            try:
                create()
            except raw.Refused:
                continue
            got = time.monotonic()
        print(json.dumps({} if got is None else {"got": got}), flush=True)


if __name__ == "__main__":
    shared = sys.argv[2]
    if not shared:
        device(rehearse=False)
    fill_and_wait(int(sys.argv[1]), raw.Rehearsal(Path(shared)) if shared else raw.cuda)
