"""The driver's own calls, by name, through cuda-bindings; and a rehearsal of them that checks every argument without a device.

`chimera.vmm` batches, tracks and rolls back; here each call stands alone, because its price is the question.
"""

from __future__ import annotations

import fcntl
import itertools
from pathlib import Path
from typing import Any, Protocol

from cuda.bindings import driver

DEVICE = 0


class Refused(Exception):
    """A call that did not succeed."""

    def __init__(self, call: str, code: int, name: str) -> None:
        super().__init__(f"{call}: {name} ({code})")
        self.code = code


class Calls(Protocol):
    def __call__(self, name: str, *arguments: Any) -> Any:
        """The call's value, or `Refused`."""
        ...


def cuda(name: str, *arguments: Any) -> Any:
    """One call of the driver."""
    code, *values = getattr(driver, name)(*arguments)
    if code != driver.CUresult.CUDA_SUCCESS:
        raise Refused(name, int(code), code.name)
    return values[0] if values else None


class Rehearsal:
    """Hands every argument to the real binding, which finds no driver library, and then answers from arithmetic.

    The bytes of the imagined device are a number in a file, so that two processes can contend for them.
    """

    def __init__(self, free_bytes: Path) -> None:
        self._free_bytes = free_bytes
        self._numbers = itertools.count(1 << 40, 1 << 36)
        self._sizes: dict[int, int] = {}

    def __call__(self, name: str, *arguments: Any) -> Any:
        try:
            getattr(driver, name)(*arguments)
        except (
            RuntimeError
        ) as error:  # what cuda-bindings raises where there is no driver library; a wrong argument raises others
            if "cuda" not in str(error).lower():
                raise
        match name:
            case "cuMemGetAllocationGranularity":
                return 2 << 20
            case "cuMemAddressReserve":
                return next(self._numbers)
            case "cuMemCreate":
                self._spend(arguments[0])
                handle = next(self._numbers)
                self._sizes[handle] = arguments[0]
                return handle
            case "cuMemRelease":
                self._spend(-self._sizes.pop(int(arguments[0])))
        return None

    def _spend(self, nbytes: int) -> None:
        with self._free_bytes.open("r+") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            left = int(file.read()) - nbytes
            if left < 0:
                code = driver.CUresult.CUDA_ERROR_OUT_OF_MEMORY
                raise Refused("cuMemCreate", int(code), code.name)
            file.seek(0)
            file.write(f"{left:020d}")
            file.flush()


OUT_OF_MEMORY = int(driver.CUresult.CUDA_ERROR_OUT_OF_MEMORY)


def on_device() -> Any:
    """How a handle of device memory is asked for."""
    wish = driver.CUmemAllocationProp()
    wish.type = driver.CUmemAllocationType.CU_MEM_ALLOCATION_TYPE_PINNED
    wish.location.type = driver.CUmemLocationType.CU_MEM_LOCATION_TYPE_DEVICE
    wish.location.id = DEVICE
    return wish


def read_write() -> Any:
    """Who may touch what is mapped: this device, both ways."""
    access = driver.CUmemAccessDesc()
    access.location.type = driver.CUmemLocationType.CU_MEM_LOCATION_TYPE_DEVICE
    access.location.id = DEVICE
    access.flags = driver.CUmemAccess_flags.CU_MEM_ACCESS_FLAGS_PROT_READWRITE
    return access


def granularity(calls: Calls, *, recommended: bool) -> int:
    flags = driver.CUmemAllocationGranularity_flags
    wanted = flags.CU_MEM_ALLOC_GRANULARITY_RECOMMENDED if recommended else flags.CU_MEM_ALLOC_GRANULARITY_MINIMUM
    return int(calls("cuMemGetAllocationGranularity", on_device(), wanted))
