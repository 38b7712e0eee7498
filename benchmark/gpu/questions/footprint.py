"""6. What a process costs before it has a model, and what an 8B's graphs and its largest prefill cost on top.

Decides the sizes of the ledger's classes (context, workspace, graphs), how many warm EMPTY workers a device can carry, and
whether parking a captured graph set is cheaper than capturing it again.
"""

from __future__ import annotations

import re
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch

from benchmark.gpu import memory, stock_engine
from benchmark.gpu.answer import Answer
from benchmark.gpu.device import device
from benchmark.gpu.partner import Partner, orders, reply

MIB = 1 << 20
GRAPHS = re.compile(r"Capture .* end\. elapsed=(?P<seconds>[\d.]+) s, mem usage=(?P<gigabytes>[\d.]+) GB")


def answer(answer: Answer, *, rehearse: bool) -> None:
    used: Callable[[], int] = memory.resident_bytes if rehearse else memory.device_used_bytes
    bare(answer, used, rehearse=rehearse)
    engine(answer, used, rehearse=rehearse)


def bare(answer: Answer, used: Callable[[], int], *, rehearse: bool) -> None:
    """A process that gains one thing after the other; the device's total is read from outside."""
    with (
        tempfile.TemporaryDirectory() as name,
        Partner(__name__, "rehearse" if rehearse else "", log=Path(name, "log")) as process,
    ):
        gain(answer, process, used, pause_s=0.0 if rehearse else 0.3)


def gain(answer: Answer, process: Partner, used: Callable[[], int], *, pause_s: float) -> None:
    """Stage after stage; `pause_s`, since NVML may lag a moment behind the driver."""
    before, total = process.told(60)["resident"], used()
    for stage in STAGES:
        told = process.ask(60, stage=stage)
        if "failed" in told:
            answer.fact(stage, told["failed"])
            continue
        time.sleep(pause_s)
        now = used()
        answer.figure(f"{stage}: on the device", (now - total) / MIB, "MiB")
        answer.figure(f"{stage}: resident", (told["resident"] - before) / MIB, "MiB")
        answer.figure(f"{stage}: takes", told["s"], "s")
        before, total = told["resident"], now


def engine(answer: Answer, used: Callable[[], int], *, rehearse: bool) -> None:
    """SGLang's own: what its graphs take, and how far a prefill of 8k tokens pushes the workspace."""
    if rehearse:
        answer.fact("the engine", "question 1 rehearses it")
        graphs(answer, "Capture target decode CUDA graph end. elapsed=1.50 s, mem usage=0.25 GB, avail mem=1.00 GB.")
        return
    with stock_engine.temporary_folder() as folder:
        empty = used()
        with stock_engine.start(Path(folder, "engine"), rehearse=rehearse) as process:
            process.told(130)
            standing = used()
            answer.figure("engine of an 8B with 128k slots of cache: on the device", (standing - empty) / MIB, "MiB")
            process.ask(batch=1, prompt=64, new=4, seed=1)
            small = used()
            process.ask(batch=1, prompt=8192, new=1, seed=2)
            large = used()
            process.ask(batch=1, prompt=8192, new=1, seed=3)
            answer.figure("first small request: on the device", (small - standing) / MIB, "MiB")
            answer.figure("first prefill of 8k tokens: on the device", (large - small) / MIB, "MiB")
            answer.figure("second prefill of 8k tokens: on the device", (used() - large) / MIB, "MiB")
            graphs(answer, process.log.read_text(errors="replace"))
        time.sleep(1.0)
        answer.figure("left on the device after the engine has ended", (used() - empty) / MIB, "MiB")


def graphs(answer: Answer, log: str) -> None:
    """What SGLang itself says that its captured graphs took."""
    told = GRAPHS.search(log)
    if told is None:
        answer.fact("captured graphs", "the log does not tell")
        return
    answer.figure("captured decode graphs of an 8B, by the log", float(told["gigabytes"]) * 1024, "MiB")
    answer.figure("capturing them takes, by the log", float(told["seconds"]), "s")


# The process that gains one thing after the other.

rehearsed = False


def context() -> None:
    device(rehearse=rehearsed)


def matrix_product() -> None:
    place = device(rehearse=rehearsed).torch
    side = 64 if rehearsed else 4096
    left = torch.ones(side, side, dtype=torch.bfloat16, device=place)
    (left @ left).sum().item()
    del left
    if place.type == "cuda":
        torch.cuda.empty_cache()


def sglang_kernels() -> None:
    """Loads the cut-down kernel library and calls one of it."""
    if rehearsed:
        return
    from sgl_kernel import rmsnorm

    rows = torch.ones(64, 4096, dtype=torch.bfloat16, device="cuda")
    rmsnorm(rows, torch.ones(4096, dtype=torch.bfloat16, device="cuda"), 1e-6).sum().item()


def sglang_imports() -> None:
    if rehearsed:
        return


def captured_graph() -> None:
    """As many nodes as an 8B's step has, about, with nothing in them: the price of a graph itself."""
    where = device(rehearse=rehearsed)
    rows = torch.ones(32, 64, device=where.torch)
    kept.extend(where.captured(lambda: [rows.add_(1) for _ in range(2 if rehearsed else 500)]) for _ in range(8))
    where.synchronize()


kept: list[object] = []
STAGES: dict[str, Callable[[], None]] = {
    "context": context,
    "first matrix product (cuBLAS)": matrix_product,
    "SGLang's kernel library": sglang_kernels,
    "SGLang's imports": sglang_imports,
    "8 captured graphs of 500 kernels": captured_graph,
}


def main() -> None:
    for order, answers in orders():
        if not order:
            reply(answers, resident=memory.resident_bytes())
            continue
        begin = time.monotonic()
        try:
            STAGES[order["stage"]]()
        except Exception as error:  # noqa: BLE001 - a stage that this machine lacks is told, and the next one goes on
            reply(answers, failed=f"{type(error).__name__}: {error}"[:500])
        else:
            reply(answers, resident=memory.resident_bytes(), s=time.monotonic() - begin)


if __name__ == "__main__":
    rehearsed = sys.argv[1] == "rehearse"
    main()
