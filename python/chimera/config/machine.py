"""The facts of this machine that decide what it can serve: packages, memory, limits, GPUs.

Reads, and never judges (`fitness.py` does). Imports neither torch nor SGLang: their versions are read from their
metadata, so that looking takes a fraction of a second and also works when they are broken.
"""

from __future__ import annotations

import importlib.metadata
import os
import platform
import re
import resource
import sys
from pathlib import Path

import msgspec

from chimera.config.nvml import Nvml, read_nvml
from chimera.config.virtual_gpus import host_memory_bytes
from chimera.units import KIB

_PACKAGES = ("sglang", "torch", "sglang-kernel", "sgl-kernel", "transformers", "cuda-bindings")
_PIN = re.compile(r"([\w.-]+)\s*(?:\[.*?\])?\s*==\s*([\w.]+)")
"""A requirement of exactly one version: `flashinfer_python[cu13]==0.6.18`."""


class SharedMemory(msgspec.Struct, frozen=True, kw_only=True):
    """/dev/shm."""

    total_bytes: int
    free_bytes: int


class HugePages(msgspec.Struct, frozen=True, kw_only=True):
    page_bytes: int = 0
    total: int = 0
    free: int = 0
    transparent: str | None = None
    """`always`, `madvise` or `never`."""
    transparent_shared: str | None = None
    """The same for shared memory: `always`, `within_size`, `advise`, `never`, …"""


class Machine(msgspec.Struct, frozen=True, kw_only=True):
    system: str
    kernel: str
    architecture: str
    processor: str
    cores: int
    """That this process may run on."""
    python: tuple[int, int, int]
    packages: dict[str, str]
    """Installed version by distribution name; what is not installed is not in it."""
    sglang_requires: dict[str, str]
    """The versions of our packages that the installed SGLang insists on."""
    memory_bytes: int
    """Of the machine, or of its container if that is less."""
    memory_available_bytes: int
    shared_memory: SharedMemory | None
    page_lock_bytes: int | None
    """How much memory a process may lock; `None` is without limit."""
    huge_pages: HugePages
    nvidia_module: bool
    """The NVIDIA driver is loaded into the kernel."""
    nvml: Nvml


def read_machine() -> Machine:
    meminfo = _meminfo()
    memory_bytes = host_memory_bytes()
    return Machine(
        system=platform.system(),
        kernel=platform.release(),
        architecture=platform.machine(),
        processor=_processor(),
        # What is not Linux has no affinity to ask for, and shall hear so from the doctor rather than in a traceback.
        cores=len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1,
        python=sys.version_info[:3],
        packages={name: version for name in _PACKAGES if (version := _version(name)) is not None},
        sglang_requires=_sglang_requires(),
        memory_bytes=memory_bytes,
        memory_available_bytes=min(memory_bytes, meminfo.get("MemAvailable", memory_bytes)),
        shared_memory=_shared_memory(),
        page_lock_bytes=_page_lock_bytes(),
        huge_pages=HugePages(
            page_bytes=meminfo.get("Hugepagesize", 0),
            total=meminfo.get("HugePages_Total", 0),
            free=meminfo.get("HugePages_Free", 0),
            transparent=_chosen("/sys/kernel/mm/transparent_hugepage/enabled"),
            transparent_shared=_chosen("/sys/kernel/mm/transparent_hugepage/shmem_enabled"),
        ),
        nvidia_module=Path("/proc/driver/nvidia/version").exists(),
        nvml=read_nvml(),
    )


def _version(distribution: str) -> str | None:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None


def _sglang_requires() -> dict[str, str]:
    try:
        lines = importlib.metadata.requires("sglang") or []
    except importlib.metadata.PackageNotFoundError:
        return {}
    pins = (_PIN.match(line) for line in lines if "extra ==" not in line)
    return {pin[1].replace("_", "-"): pin[2] for pin in pins if pin and pin[1].replace("_", "-") in _PACKAGES}


def _meminfo() -> dict[str, int]:
    """Bytes, or a count for the lines that have no unit."""
    found = {}
    for line in _read("/proc/meminfo").splitlines():
        name, _, rest = line.partition(":")
        amount, *unit = rest.split()
        found[name] = int(amount) * (KIB if unit == ["kB"] else 1)
    return found


def _processor() -> str:
    for line in _read("/proc/cpuinfo").splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.machine()


def _shared_memory() -> SharedMemory | None:
    try:
        told = os.statvfs("/dev/shm")
    except OSError:
        return None
    return SharedMemory(total_bytes=told.f_blocks * told.f_frsize, free_bytes=told.f_bavail * told.f_frsize)


def _page_lock_bytes() -> int | None:
    soft, _hard = resource.getrlimit(resource.RLIMIT_MEMLOCK)
    return None if soft == resource.RLIM_INFINITY else soft


def _chosen(path: str) -> str | None:
    """The word in brackets: `always [madvise] never`."""
    _, opened, rest = _read(path).partition("[")
    return rest.partition("]")[0] if opened else None


def _read(path: str) -> str:
    try:
        return Path(path).read_text()
    except OSError:  # another kernel, or a container that hides it
        return ""
