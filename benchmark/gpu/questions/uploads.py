"""5. How fast weights travel from the host's memory to the device.

Decides the copier (a page-locked staging ring in each worker, or weights that are page-locked where they lie), how many threads
feed it, and the floor under every activation time that we promise: nothing wakes faster than its bytes can travel.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import mmap
import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import torch

from benchmark.gpu import raw
from benchmark.gpu.answer import Answer
from benchmark.gpu.device import Device, device

GB = 10**9
MIB = 1 << 20
CHUNK_BYTES = 64 * MIB
FLOORS_GB = (2, 6, 16, 28, 64, 70)
PORTABLE = 1
"""CU_MEMHOSTREGISTER_PORTABLE: page-locked for every context."""
SHMEM_HUGE = Path("/sys/kernel/mm/transparent_hugepage/shmem_enabled")


@dataclass(frozen=True, slots=True, kw_only=True)
class Region:
    """Host memory that processes can share, as a weight store would hold it."""

    file: int
    address: int
    nbytes: int


@contextlib.contextmanager
def region(nbytes: int, file: int | None = None) -> Iterator[Region]:
    """A memory file mapped whole; huge pages where the machine lets shared memory have them."""
    nbytes = -(-nbytes // (2 * MIB)) * (2 * MIB)
    own = file is None
    file = os.memfd_create("weights") if file is None else file
    if own:
        os.ftruncate(file, nbytes)
    mapped = mmap.mmap(file, nbytes)
    with contextlib.suppress(OSError):
        mapped.madvise(mmap.MADV_HUGEPAGE)
    window = (ctypes.c_char * nbytes).from_buffer(mapped)
    try:
        yield Region(file=file, address=ctypes.addressof(window), nbytes=nbytes)
    finally:
        del window
        mapped.close()
        if own:
            os.close(file)


def answer(answer: Answer, *, rehearse: bool) -> None:
    where = device(rehearse=rehearse)
    scale = 1 / 1000 if rehearse else 1.0
    calls: raw.Calls = raw.Rehearsal(Path(os.devnull)) if rehearse else raw.cuda
    answer.fact("huge pages for shared memory", SHMEM_HUGE.read_text().strip() if SHMEM_HUGE.exists() else "not offered")
    torch.set_num_threads(1)  # how many threads copy is the question: torch must not add its own
    best: dict[str, float] = {}
    with region(int(16 * GB * scale)) as weights:
        touch(answer, weights)
        target = torch.empty(weights.nbytes, dtype=torch.uint8, device=where.torch)
        best["pageable"] = pageable(answer, where, weights, target, int(4 * GB * scale))
        for threads in (1, 2) if rehearse else (1, 2, 4, 8):
            speed = ring(answer, where, weights, target, threads, page_lock=not rehearse)
            best["ring"] = max(best.get("ring", 0.0), speed)
        for gigabytes in (1, 16):
            register(answer, calls, weights, int(gigabytes * GB * scale), f"{gigabytes} GB")
        register_in_parts(answer, calls, weights, threads=8)
        in_second_process(answer, weights, rehearse=rehearse)
        best["registered"] = registered(answer, where, calls, weights, target)
        del target
    for way, speed in best.items():
        for gigabytes in FLOORS_GB:
            answer.figure(f"floor for {gigabytes} GB, {way}", gigabytes / speed, "s")
    # Last: the size that a machine may not have.
    with region(int(64 * GB * scale)) as weights:
        touch(answer, weights)
        register(answer, calls, weights, weights.nbytes, "64 GB")
        target = torch.empty(weights.nbytes, dtype=torch.uint8, device=where.torch)
        ring(answer, where, weights, target, 2 if rehearse else 8, page_lock=not rehearse)


def touch(answer: Answer, weights: Region) -> None:
    """Gives every page its memory, as building an image does, so that no later figure pays for it."""
    begin = time.perf_counter()
    with ThreadPoolExecutor(8) as pool:
        chunks = range(0, weights.nbytes, CHUNK_BYTES)
        list(pool.map(lambda at: ctypes.memset(weights.address + at, 37, min(CHUNK_BYTES, weights.nbytes - at)), chunks))
    spent = time.perf_counter() - begin
    answer.figure(f"first touch of {weights.nbytes / GB:.3g} GB, 8 threads", weights.nbytes / GB / spent, "GB/s")


def view(weights: Region, offset: int = 0, nbytes: int | None = None) -> torch.Tensor:
    nbytes = weights.nbytes - offset if nbytes is None else nbytes
    return torch.frombuffer((ctypes.c_uint8 * nbytes).from_address(weights.address + offset), dtype=torch.uint8)


def pageable(answer: Answer, where: Device, weights: Region, target: torch.Tensor, nbytes: int) -> float:
    """`copy_` straight out of the shared region: the driver stages it as it likes."""
    source = view(weights, 0, nbytes)
    speeds = [nbytes / GB / s for s in where.seconds(lambda: target[:nbytes].copy_(source), 3)]
    answer.samples("copy, pageable", speeds, "GB/s")
    return max(speeds)


def ring(answer: Answer, where: Device, weights: Region, target: torch.Tensor, threads: int, *, page_lock: bool) -> float:
    """Each thread copies chunk after chunk into its own two page-locked buffers and sends them on its own stream."""
    on_gpu = where.torch.type == "cuda"
    buffers = [[torch.empty(CHUNK_BYTES, dtype=torch.uint8, pin_memory=page_lock) for _ in range(2)] for _ in range(threads)]
    streams = [torch.cuda.Stream() for _ in range(threads)] if on_gpu else [None] * threads
    chunks = iter(range(0, weights.nbytes, CHUNK_BYTES))
    lock = threading.Lock()

    def feed(own: list[torch.Tensor], stream: torch.cuda.Stream | None) -> None:
        sent: list[torch.cuda.Event | None] = [None, None]
        turn = 0
        with torch.cuda.stream(stream) if on_gpu else contextlib.nullcontext():
            while True:
                with lock:
                    at = next(chunks, None)
                if at is None:
                    break
                nbytes = min(CHUNK_BYTES, weights.nbytes - at)
                if (before := sent[turn]) is not None:
                    before.synchronize()  # the device still reads this buffer
                ctypes.memmove(own[turn].data_ptr(), weights.address + at, nbytes)  # leaves the interpreter's lock
                target[at : at + nbytes].copy_(own[turn][:nbytes], non_blocking=True)
                if stream is not None:
                    sent[turn] = done = torch.cuda.Event()
                    done.record(stream)
                turn = 1 - turn

    with ThreadPoolExecutor(threads) as pool:
        begin = time.perf_counter()
        for done in [pool.submit(feed, own, stream) for own, stream in zip(buffers, streams, strict=True)]:
            done.result()
        where.synchronize()
        speed = weights.nbytes / GB / (time.perf_counter() - begin)
    answer.figure(f"copy of {weights.nbytes / GB:.3g} GB, page-locked ring, {threads} threads", speed, "GB/s")
    if not bool((target[:: 1 << 20] == 37).all()):
        answer.fact(f"the ring with {threads} threads", "delivered something else")
    target.zero_()
    return speed


def register(answer: Answer, calls: raw.Calls, weights: Region, nbytes: int, label: str) -> None:
    """Page-locking memory that is there already, and letting it go."""
    nbytes = min(nbytes, weights.nbytes)
    begin = time.perf_counter()
    calls("cuMemHostRegister", weights.address, nbytes, PORTABLE)
    locked = time.perf_counter()
    calls("cuMemHostUnregister", weights.address)
    answer.figure(f"page-lock {label}", locked - begin, "s")
    answer.figure(f"page-unlock {label}", time.perf_counter() - locked, "s")


def register_in_parts(answer: Answer, calls: raw.Calls, weights: Region, *, threads: int) -> None:
    """The same in parts of 1 GiB by several threads: whether the kernel lets them work at once."""
    current = None if isinstance(calls, raw.Rehearsal) else calls("cuCtxGetCurrent")

    def lock(at: int) -> None:
        if current is not None:
            calls("cuCtxSetCurrent", current)  # a fresh thread has no context
        calls("cuMemHostRegister", weights.address + at, min(1 << 30, weights.nbytes - at), PORTABLE)

    parts = range(0, weights.nbytes, 1 << 30)
    with ThreadPoolExecutor(threads) as pool:
        begin = time.perf_counter()
        list(pool.map(lock, parts))
        answer.figure(f"page-lock {weights.nbytes / GB:.3g} GB in parts, {threads} threads", time.perf_counter() - begin, "s")
    for at in parts:
        calls("cuMemHostUnregister", weights.address + at)


def in_second_process(answer: Answer, weights: Region, *, rehearse: bool) -> None:
    """Page-locking belongs to a process: what the next one pays for the same pages, while the first holds them locked."""
    command = [sys.executable, __file__, str(weights.file), str(weights.nbytes), "rehearse" if rehearse else "measure"]
    done = subprocess.run(command, pass_fds=[weights.file], capture_output=True, text=True)
    if done.returncode:
        answer.fact("page-lock in a second process", done.stderr.strip().splitlines()[-1] if done.stderr.strip() else "failed")
        return
    answer.figure("page-lock 16 GB in a second process", json.loads(done.stdout)["s"], "s")


def registered(answer: Answer, where: Device, calls: raw.Calls, weights: Region, target: torch.Tensor) -> float:
    """Straight from the weights, page-locked where they lie."""
    calls("cuMemHostRegister", weights.address, weights.nbytes, PORTABLE)
    source = view(weights)
    speeds = [weights.nbytes / GB / s for s in where.seconds(lambda: target.copy_(source, non_blocking=True), 3)]
    where.synchronize()
    calls("cuMemHostUnregister", weights.address)
    answer.samples("copy, page-locked in place", speeds, "GB/s")
    return max(speeds)


def second_process(file: int, nbytes: int, *, rehearse: bool) -> None:
    device(rehearse=rehearse)
    calls: raw.Calls = raw.Rehearsal(Path(os.devnull)) if rehearse else raw.cuda
    with region(nbytes, file) as weights:
        begin = time.perf_counter()
        calls("cuMemHostRegister", weights.address, weights.nbytes, PORTABLE)
        print(json.dumps({"s": time.perf_counter() - begin}))
        calls("cuMemHostUnregister", weights.address)


if __name__ == "__main__":
    second_process(int(sys.argv[1]), int(sys.argv[2]), rehearse=sys.argv[3] == "rehearse")
