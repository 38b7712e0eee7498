"""The GPUs of this machine as the driver's management library tells them: no context is made and nothing is held.

Knows what is there, not whether it is any good (`fitness.py` says that).
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import msgspec
import pynvml


class GpuUser(msgspec.Struct, frozen=True, kw_only=True):
    """A process that holds memory on a GPU."""

    pid: int
    name: str | None = None
    """Unknown for a process of another container."""
    used_bytes: int | None = None


class MigInstance(msgspec.Struct, frozen=True, kw_only=True):
    """A slice of a GPU that MIG has made, as good as a small GPU of its own."""

    uuid: str
    name: str
    total_bytes: int


class GpuFacts(msgspec.Struct, frozen=True, kw_only=True):
    index: int
    uuid: str
    name: str
    total_bytes: int
    used_bytes: int
    mig: bool = False
    mig_instances: tuple[MigInstance, ...] = ()
    exclusive: bool = False
    """The compute mode lets one process in, or none."""
    users: tuple[GpuUser, ...] = ()


class Nvml(msgspec.Struct, frozen=True, kw_only=True):
    """What NVML says; or, in `fault`, why it says nothing."""

    fault: str | None = None
    driver: str | None = None
    cuda: tuple[int, int] | None = None
    """The newest CUDA that the driver serves."""
    gpus: tuple[GpuFacts, ...] = ()


def read_nvml(library: Any = pynvml) -> Nvml:
    try:
        library.nvmlInit()
    except library.NVMLError as fault:
        return Nvml(fault=str(fault))
    try:
        cuda = library.nvmlSystemGetCudaDriverVersion_v2()
        return Nvml(
            driver=library.nvmlSystemGetDriverVersion(),
            cuda=(cuda // 1000, cuda % 1000 // 10),
            gpus=tuple(_gpu(library, index) for index in range(library.nvmlDeviceGetCount())),
        )
    except library.NVMLError as fault:
        return Nvml(fault=str(fault))
    finally:
        library.nvmlShutdown()


def _gpu(library: Any, index: int) -> GpuFacts:
    device = library.nvmlDeviceGetHandleByIndex(index)
    memory = library.nvmlDeviceGetMemoryInfo(device)
    mig = _mig_enabled(library, device)
    return GpuFacts(
        index=index,
        uuid=library.nvmlDeviceGetUUID(device),
        name=library.nvmlDeviceGetName(device),
        total_bytes=memory.total,
        used_bytes=memory.used,
        mig=mig,
        mig_instances=tuple(_mig_instances(library, device)) if mig else (),
        exclusive=library.nvmlDeviceGetComputeMode(device) != library.NVML_COMPUTEMODE_DEFAULT,
        users=tuple(_users(library, device)),
    )


def _mig_enabled(library: Any, device: Any) -> bool:
    try:
        current, _after_reset = library.nvmlDeviceGetMigMode(device)
    except library.NVMLError_NotSupported:  # a GPU that cannot be split
        return False
    return bool(current == library.NVML_DEVICE_MIG_ENABLE)


def _mig_instances(library: Any, device: Any) -> Iterator[MigInstance]:
    for slot in range(library.nvmlDeviceGetMaxMigDeviceCount(device)):
        try:
            instance = library.nvmlDeviceGetMigDeviceHandleByIndex(device, slot)
        except library.NVMLError_NotFound:  # slots are numbered through, used or not
            continue
        yield MigInstance(
            uuid=library.nvmlDeviceGetUUID(instance),
            name=library.nvmlDeviceGetName(instance),
            total_bytes=library.nvmlDeviceGetMemoryInfo(instance).total,
        )


def _users(library: Any, device: Any) -> Iterator[GpuUser]:
    try:
        processes = library.nvmlDeviceGetComputeRunningProcesses(device)
    except library.NVMLError:  # not told to everyone; the memory in use still is
        return
    for process in processes:
        yield GpuUser(pid=process.pid, name=_process_name(library, process.pid), used_bytes=process.usedGpuMemory)


def _process_name(library: Any, pid: int) -> str | None:
    try:
        return str(library.nvmlSystemGetProcessName(pid))
    except library.NVMLError:
        return None
