"""7. Whether the child of a parent that has SGLang imported, and the device untouched, gets a working device.

Decides how warm workers are made: forked from a preloaded parent (a fraction of a second, pages shared), or, where that fails,
spawned ahead of need and kept as spares; and which calls the parent must be kept from while it imports.
"""

from __future__ import annotations

import contextlib
import json
import os
import select
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

from benchmark.gpu.answer import Answer
from benchmark.gpu.partner import Partner, PartnerLost, orders, reply

CHILD_LIMIT_S = 30.0
PARENTS = {
    "nothing imported": "",
    "torch imported": "torch",
    "torch imported, devices counted": "torch count",
    "SGLang imported, device facts from NVML": "torch nvml sglang",
    "SGLang imported as it is": "torch sglang",
}
REHEARSED = ("nothing imported", "torch imported, devices counted")
"""Where there is neither a device nor time for SGLang's imports, the others would run the same lines again."""


def answer(answer: Answer, *, rehearse: bool) -> None:
    mode = "rehearse" if rehearse else "measure"
    with tempfile.TemporaryDirectory() as name:
        log = Path(name, "log")
        for parent in REHEARSED if rehearse else PARENTS:
            steps = PARENTS[parent]
            with Partner(__name__, mode, steps, log=log) as process:
                try:
                    told = process.told(60 + CHILD_LIMIT_S)
                except PartnerLost as lost:
                    answer.fact(f"parent with {parent}", lost)
                    continue
            answer.figure(f"parent with {parent}: imports", told["imports_s"], "s")
            answer.figure(f"parent with {parent}: threads at the fork", told["threads"], "")
            answer.fact(f"parent with {parent}: CUDA initialised", told["initialised"])
            for child in told["children"]:
                what = f"child of a parent with {parent}"
                if "failed" in child:
                    answer.fact(what, child["failed"])
                    continue
                answer.figure(f"{what}: fork to device ready", child["ready_s"], "s")
                answer.figure(f"{what}: private memory", child["private_bytes"] / (1 << 20), "MiB")
                answer.fact(what, child["works"])
        begin = time.monotonic()
        with Partner(__name__, mode, "torch sglang spare", log=log) as spare:
            spare.told(60)
            answer.figure("a spawned spare: start to SGLang imported and device ready", time.monotonic() - begin, "s")


def main() -> None:
    rehearse, steps = sys.argv[1] == "rehearse", sys.argv[2].split()
    for _, answers in orders():
        begin = time.monotonic()
        with contextlib.ExitStack() as facts:
            if "torch" in steps:
                import torch
            if "count" in steps:
                torch.cuda.device_count()
                torch.cuda.is_available()
            if "nvml" in steps and not rehearse:
                facts.enter_context(device_facts(from_nvml()))
            if "sglang" in steps and not rehearse:
                pass
        if "spare" in steps:
            touch(rehearse=rehearse)
            reply(answers)
            return
        told: dict[str, Any] = {
            "imports_s": time.monotonic() - begin,
            "threads": len(os.listdir("/proc/self/task")),
            "initialised": "torch" in sys.modules and sys.modules["torch"].cuda.is_initialized(),
        }
        # The second child finds what the first has compiled and cached.
        told["children"] = [child(rehearse=rehearse, with_sglang="sglang" in steps) for _ in range(2)]
        reply(answers, **told)
        return


def from_nvml() -> SimpleNamespace:
    """What torch would say of the first device, without asking CUDA."""
    import pynvml

    pynvml.nvmlInit()
    handle = pynvml.nvmlDeviceGetHandleByIndex(0)
    major, minor = pynvml.nvmlDeviceGetCudaComputeCapability(handle)
    found = SimpleNamespace(
        name=pynvml.nvmlDeviceGetName(handle),
        major=major,
        minor=minor,
        total_memory=pynvml.nvmlDeviceGetMemoryInfo(handle).total,
        multi_processor_count=pynvml.nvmlDeviceGetNumGpuCores(handle) // 128,
        warp_size=32,
        max_threads_per_multi_processor=2048,
        regs_per_multiprocessor=65536,
        gcnArchName="",
    )
    pynvml.nvmlShutdown()
    return found


@contextlib.contextmanager
def device_facts(facts: SimpleNamespace) -> Iterator[None]:
    """While SGLang imports, torch answers from these facts: one query of the device, and no fork could use it any more."""
    import torch

    answers = {
        "is_available": True,
        "device_count": 1,
        "current_device": 0,
        "get_device_capability": (facts.major, facts.minor),
        "get_device_properties": facts,
        "get_device_name": facts.name,
        "mem_get_info": (facts.total_memory, facts.total_memory),
    }
    with contextlib.ExitStack() as stack:
        for name, value in answers.items():
            stack.enter_context(mock.patch.object(torch.cuda, name, lambda *_, value=value, **__: value))
        yield


def child(*, rehearse: bool, with_sglang: bool) -> dict[str, Any]:
    """Forks, and has the child use the device; gives up on it after a while."""
    reading, writing = os.pipe()
    begin = time.monotonic()
    pid = os.fork()
    if pid == 0:
        try:
            touch(rehearse=rehearse)
            ready_s = time.monotonic() - begin
            works = kernels(rehearse=rehearse, with_sglang=with_sglang)
            told: dict[str, Any] = {"ready_s": ready_s, "private_bytes": private_bytes(), "works": works}
        except BaseException as error:  # noqa: BLE001 - the outermost frame of a child that must not return
            traceback.print_exc()
            told = {"failed": f"{type(error).__name__}: {error}"[:500]}
        os.write(writing, json.dumps(told).encode())
        os._exit(0)
    os.close(writing)
    ready, _, _ = select.select([reading], [], [], CHILD_LIMIT_S)
    line = os.read(reading, 1 << 16) if ready else b""
    os.close(reading)
    if not ready:
        os.kill(pid, signal.SIGKILL)
    _, status = os.waitpid(pid, 0)
    if not line:
        return {"failed": f"ended with status {status}" if ready else f"said nothing within {CHILD_LIMIT_S:.0f} s"}
    answered: dict[str, Any] = json.loads(line)
    return answered


def touch(*, rehearse: bool) -> None:
    """The context, and a result that is right."""
    from benchmark.gpu.device import device

    where = device(rehearse=rehearse)
    import torch

    left = torch.full((256, 256), 2.0, device=where.torch)
    if (left @ left).sum().item() != 4.0 * 256**3:
        raise ArithmeticError("the device computes something else")


def kernels(*, rehearse: bool, with_sglang: bool) -> str:
    """Which kinds of kernels run: a graph, Triton's, SGLang's; one that fails is told with its words."""
    import torch

    from benchmark.gpu.device import device

    where = device(rehearse=rehearse)

    def graph() -> None:
        rows = torch.ones(4, device=where.torch)
        where.captured(lambda: rows.mul_(2))()
        where.synchronize()

    def triton() -> None:
        from benchmark.gpu.split_decode import attend

        rows = torch.ones(256, 8, 128, dtype=torch.bfloat16, device=where.torch)
        slots = torch.arange(256, device=where.torch).view(1, -1)
        if not torch.allclose(attend(rows[:1].repeat(1, 4, 1), rows, rows, slots).float(), torch.ones((), device=where.torch)):
            raise ArithmeticError("something else comes out")

    def sglang() -> None:
        from sgl_kernel import rmsnorm

        rows = torch.ones(4, 4096, dtype=torch.bfloat16, device=where.torch)
        rmsnorm(rows, rows[0], 1e-6).sum().item()

    told = []
    for work in (graph,) if rehearse else (graph, triton, *((sglang,) if with_sglang else ())):
        try:
            work()
        except Exception as error:  # noqa: BLE001 - which of them work is the question
            told.append(f"{work.__name__} {type(error).__name__}: {error}"[:300])
        else:
            told.append(f"{work.__name__} works")
    return ", ".join(["device works", *told])


def private_bytes() -> int:
    """What this process shares with nobody."""
    lines = Path("/proc/self/smaps_rollup").read_text().splitlines()
    return sum(int(line.split()[1]) << 10 for line in lines if line.startswith(("Private_Clean", "Private_Dirty")))


if __name__ == "__main__":
    main()
