"""Whether a machine can serve, with which devices, and what an operator should mend: pure, from its facts.

Every problem carries the command that mends it. Reads nothing; adding a check is adding a function to `_CHECKS`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import msgspec

from chimera.config.machine import Machine
from chimera.config.nvml import GpuFacts
from chimera.config.virtual_gpus import default_virtual_gpus
from chimera.core.gpu import Gpu
from chimera.units import GIB, MIB, format_bytes

PYTHONS = ((3, 11), (3, 12))
OLDEST_SGLANG = (0, 5, 16)
NEWEST_SGLANG = (0, 5, 23)
PINNED = {"sglang": "0.5.20", "torch": "2.13.0"}
"""The pair that requirements/ installs and the tests run on."""
LEAST_MEMORY_BYTES = 4 * GIB
"""The preloaded parent, a worker with a tiny model, control, agent and a front-end."""
LEAST_SHARED_BYTES = GIB
LEAST_PAGE_LOCK_BYTES = 64 * MIB
"""What the staging rings of one worker lock."""

_SET_UP = "make install"
_SET_UP_ANEW = "make clean install"


class Problem(msgspec.Struct, frozen=True, kw_only=True):
    what: str
    mend: str
    """The command to type."""
    stops: bool
    """The machine cannot serve before this is mended."""


def can_serve(problems: Sequence[Problem]) -> bool:
    return not any(problem.stops for problem in problems)


def devices(machine: Machine) -> tuple[Gpu, ...]:
    """What the server would use by itself: every GPU or, on a machine without one, a virtual GPU."""
    slices = [part for gpu in machine.nvml.gpus for part in _parts(gpu)]
    if not slices:
        return default_virtual_gpus(memory_bytes=machine.memory_bytes)
    return tuple(Gpu(gpu_id=number, capacity_bytes=size, name=name) for number, (name, size) in enumerate(slices))


def problems(machine: Machine) -> list[Problem]:
    """The worst first."""
    found = [problem for check in _CHECKS for problem in check(machine)]
    return sorted(found, key=lambda problem: not problem.stops)


def _parts(gpu: GpuFacts) -> list[tuple[str, int]]:
    if gpu.mig:
        return [(instance.name, instance.total_bytes) for instance in gpu.mig_instances]
    return [(gpu.name, gpu.total_bytes)]


def _platform(machine: Machine) -> Iterator[Problem]:
    if machine.system != "Linux":
        what = f"the system is {machine.system}; mapping memory elastically needs Linux"
        yield Problem(what=what, mend="docker run -it --rm ubuntu:24.04", stops=True)
    if machine.python[:2] not in PYTHONS:
        what = f"Python is {_dotted(machine.python)}; it must be 3.11 or 3.12"
        yield Problem(what=what, mend=f"{_SET_UP_ANEW} PYTHON=python3.12", stops=True)


def _engine(machine: Machine) -> Iterator[Problem]:
    for package in ("sglang", "torch"):
        if package not in machine.packages:
            yield Problem(what=f"{package} is not installed", mend=_SET_UP, stops=True)
    sglang = machine.packages.get("sglang")
    if sglang is not None and not OLDEST_SGLANG <= _release(sglang) <= NEWEST_SGLANG:
        what = f"SGLang is {sglang}; this release works with {_dotted(OLDEST_SGLANG)} to {_dotted(NEWEST_SGLANG)}"
        yield Problem(what=what, mend=f".venv/bin/python -m pip install --no-deps sglang=={PINNED['sglang']}", stops=True)


def _engine_on_cpu(machine: Machine) -> Iterator[Problem]:
    if machine.nvml.gpus:
        return
    for package, tested in PINNED.items():
        installed = machine.packages.get(package)
        if installed is not None and _release(installed) != _release(tested):
            what = f"{package} is {installed}; without a GPU only {tested} is tested"
            mend = f".venv/bin/python -m pip install --no-deps {package}=={tested}"
            yield Problem(what=what, mend=mend, stops=False)


def _engine_on_gpu(machine: Machine) -> Iterator[Problem]:
    if not machine.nvml.gpus:
        return
    torch, wanted = machine.packages.get("torch"), machine.sglang_requires.get("torch")
    if torch is not None and torch.endswith("+cpu"):
        yield Problem(what=f"torch is {torch}, built without CUDA, and there is a GPU", mend=_SET_UP_ANEW, stops=True)
    elif torch is not None and wanted is not None and _release(torch) != _release(wanted):
        what = f"torch is {torch}; the kernels of SGLang {machine.packages['sglang']} are built for {wanted}"
        yield Problem(what=what, mend=f".venv/bin/python -m pip install torch=={wanted}", stops=True)
    driver_cuda, built_for = machine.nvml.cuda, _cuda_of(torch)
    if driver_cuda is not None and built_for is not None and built_for > driver_cuda[0]:
        what = f"the driver {machine.nvml.driver} serves CUDA up to {_dotted(driver_cuda)}; torch {torch} needs {built_for}"
        yield Problem(what=what, mend="sudo ubuntu-drivers install", stops=True)
    if "sglang" in machine.packages and not machine.packages.keys() & {"sglang-kernel", "sgl-kernel"}:
        pin = machine.sglang_requires.get("sglang-kernel")
        mend = f".venv/bin/python -m pip install sglang-kernel=={pin}" if pin else _SET_UP
        yield Problem(what="SGLang's kernels (sglang-kernel) are not installed", mend=mend, stops=True)
    if "cuda-bindings" not in machine.packages:
        what = "cuda-bindings is not installed; without it memory cannot be mapped"
        yield Problem(what=what, mend=".venv/bin/python -m pip install 'cuda-bindings>=12.6'", stops=True)


def _driver(machine: Machine) -> Iterator[Problem]:
    if machine.nvidia_module and machine.nvml.fault is not None:
        what = f"an NVIDIA driver is loaded, but NVML does not answer ({machine.nvml.fault})"
        yield Problem(what=what, mend="nvidia-smi  # in a container: docker run --gpus all …", stops=True)


def _gpus(machine: Machine) -> Iterator[Problem]:
    nothing_left = not any(_parts(gpu) for gpu in machine.nvml.gpus)
    for gpu in machine.nvml.gpus:
        if gpu.exclusive:
            what = f"GPU {gpu.index} lets only one process in; models that share it are processes of their own"
            yield Problem(what=what, mend=f"sudo nvidia-smi -i {gpu.index} -c DEFAULT", stops=True)
        if gpu.mig and not gpu.mig_instances:
            what = f"GPU {gpu.index} is in MIG mode and has no instance, so nothing can run on it"
            yield Problem(what=what, mend=f"sudo nvidia-smi -i {gpu.index} -mig 0", stops=nothing_left)
        elif gpu.mig:
            what = f"GPU {gpu.index} is split by MIG: each instance counts as a GPU, and no model spans two of them"
            yield Problem(what=what, mend=f"sudo nvidia-smi -i {gpu.index} -mig 0", stops=False)
        if gpu.users:
            # Only a look: they may be the workers of a server that is running.
            pids = ",".join(str(user.pid) for user in gpu.users)
            yield Problem(what=_held(gpu), mend=f"ps -o pid,user,etime,args -p {pids}  # then stop what may stop", stops=False)


def _held(gpu: GpuFacts) -> str:
    users = ", ".join(f"{user.name or 'a process'} ({user.pid})" for user in gpu.users)
    return f"GPU {gpu.index}: {format_bytes(gpu.used_bytes)} of {format_bytes(gpu.total_bytes)} are in use, by {users}"


def _memory(machine: Machine) -> Iterator[Problem]:
    if machine.memory_bytes < LEAST_MEMORY_BYTES:
        what = f"there are {format_bytes(machine.memory_bytes)} of memory; one tiny model takes about 4 GiB in all"
        yield Problem(what=what, mend="docker run --memory=8g …", stops=True)
    elif machine.memory_available_bytes < LEAST_MEMORY_BYTES:
        what = f"only {format_bytes(machine.memory_available_bytes)} of memory are free; starting takes about 4 GiB"
        yield Problem(what=what, mend="ps aux --sort=-rss | head", stops=False)
    shared = machine.shared_memory
    if shared is None:
        what = "there is no /dev/shm; SGLang's ranks and torch meet there"
        yield Problem(what=what, mend="sudo mount -t tmpfs -o size=50% tmpfs /dev/shm", stops=True)
    elif shared.total_bytes < LEAST_SHARED_BYTES:
        what = f"/dev/shm has {format_bytes(shared.total_bytes)}; tensor parallel models need at least 1 GiB"
        mend = "sudo mount -o remount,size=50% /dev/shm  # or docker run --shm-size=16g …"
        yield Problem(what=what, mend=mend, stops=False)
    elif shared.free_bytes < LEAST_SHARED_BYTES:
        what = f"/dev/shm has only {format_bytes(shared.free_bytes)} free"
        yield Problem(what=what, mend="ls -lSh /dev/shm | head", stops=False)


def _copying(machine: Machine) -> Iterator[Problem]:
    """What makes weights slow to arrive on a GPU."""
    if not machine.nvml.gpus:
        return
    locked = machine.page_lock_bytes
    if locked is not None and locked < LEAST_PAGE_LOCK_BYTES:
        what = f"a process may lock {format_bytes(locked)} of memory; copies to a GPU are slow from memory that is not locked"
        yield Problem(what=what, mend="ulimit -l unlimited  # or docker run --ulimit memlock=-1 …", stops=False)
    if machine.huge_pages.transparent_shared in ("never", "deny"):
        what = "shared memory has no huge pages; weights are slower to open and to copy"
        mend = "echo advise | sudo tee /sys/kernel/mm/transparent_hugepage/shmem_enabled"
        yield Problem(what=what, mend=mend, stops=False)


_CHECKS = (_platform, _engine, _engine_on_cpu, _engine_on_gpu, _driver, _gpus, _memory, _copying)


def _release(version: str) -> tuple[int, ...]:
    """The numbers alone: `2.13.0+cpu` → (2, 13, 0), `0.5.20rc1` → (0, 5, 20)."""
    numbers = []
    for part in version.partition("+")[0].split("."):
        digits = part[: len(part) - len(part.lstrip("0123456789"))]
        if not digits:
            break
        numbers.append(int(digits))
    return tuple(numbers)


def _cuda_of(torch: str | None) -> int | None:
    """The major CUDA version that a torch wheel names: `2.13.0+cu130` → 13."""
    _, named, digits = (torch or "").partition("+cu")
    return int(digits) // 10 if named and digits.isdigit() else None


def _dotted(version: tuple[int, ...]) -> str:
    return ".".join(map(str, version))
