"""Where a question computes: one CUDA device, or, when it is rehearsed, the CPU. Knows how each is timed; knows no question."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import NamedTuple, Protocol

import torch

Work = Callable[[], object]


class Running(NamedTuple):
    """Work under way on a device."""

    done: Callable[[], bool]
    seconds: Callable[[], float]
    """Waits for the end; how long the device was at it."""


class Device(Protocol):
    """What questions ask of a device, so that they read the same on a GPU and in a rehearsal."""

    torch: torch.device

    def seconds(self, work: Work, repetitions: int) -> list[float]:
        """How long the device takes for `work`, each time; once before that, untimed."""
        ...

    def start(self, work: Work) -> Running:
        """Submits `work` and does not wait for it."""
        ...

    def captured(self, work: Work) -> Work:
        """`work` as a graph: its replay. What `work` reads and writes keeps its addresses."""
        ...

    def synchronize(self) -> None: ...

    def free_bytes(self) -> int: ...


class Gpu:
    """The first CUDA device that this process sees."""

    def __init__(self) -> None:
        self.torch = torch.device("cuda", 0)
        torch.cuda.set_device(self.torch)
        torch.zeros(1, device=self.torch)  # makes the primary context, and makes it current in this thread

    def seconds(self, work: Work, repetitions: int) -> list[float]:
        work()
        torch.cuda.synchronize()
        marks = [(torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)) for _ in range(repetitions)]
        for begin, end in marks:
            begin.record()
            work()
            end.record()
        torch.cuda.synchronize()
        return [begin.elapsed_time(end) / 1e3 for begin, end in marks]

    def start(self, work: Work) -> Running:
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        work()
        end.record()

        def seconds() -> float:
            end.synchronize()
            return begin.elapsed_time(end) / 1e3

        return Running(done=end.query, seconds=seconds)

    def captured(self, work: Work) -> Work:
        # Compiles, makes handles and workspaces: none of it may happen under capture.
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(2):
                work()
        torch.cuda.current_stream().wait_stream(side)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            work()
        return graph.replay

    def synchronize(self) -> None:
        torch.cuda.synchronize()

    def free_bytes(self) -> int:
        return torch.cuda.mem_get_info()[0]


class Host:
    """The CPU in the part of a device: everything is done when a call returns."""

    def __init__(self) -> None:
        self.torch = torch.device("cpu")

    def seconds(self, work: Work, repetitions: int) -> list[float]:
        work()
        spent = []
        for _ in range(repetitions):
            begin = time.perf_counter()
            work()
            spent.append(time.perf_counter() - begin)
        return spent

    def start(self, work: Work) -> Running:
        begin = time.perf_counter()
        work()
        spent = time.perf_counter() - begin
        return Running(done=lambda: True, seconds=lambda: spent)

    def captured(self, work: Work) -> Work:
        return work

    def synchronize(self) -> None:
        pass

    def free_bytes(self) -> int:
        return 1 << 30


def device(*, rehearse: bool) -> Device:
    return Host() if rehearse else Gpu()
