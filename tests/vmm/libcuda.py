"""A libcuda for machines without one: NVIDIA's own types, calls that keep the documented rules and touch no device."""

from __future__ import annotations

import itertools
from collections import Counter
from typing import Any

from cuda.bindings import driver

OK = driver.CUresult.CUDA_SUCCESS
INVALID = driver.CUresult.CUDA_ERROR_INVALID_VALUE
OUT_OF_MEMORY = driver.CUresult.CUDA_ERROR_OUT_OF_MEMORY
GRANULE = 2 << 20


class StandInLibcuda:
    def __init__(self) -> None:
        self.calls: Counter[str] = Counter()
        self.handles: set[int] = set()
        self.mapped: dict[int, tuple[int, int]] = {}
        self.accessible: set[int] = set()
        self.scrubbed: list[tuple[int, int]] = []
        self.reserved: dict[int, int] = {}
        self.refused: dict[str, int] = {}
        self._numbers = itertools.count(1)

    def refuse(self, call: str, nth: int) -> None:
        self.refused[call] = self.calls[call] + nth

    def __getattr__(self, name: str) -> Any:
        """NVIDIA's own enumerations and structs; only the calls below are stood in for."""
        return getattr(driver, name)

    def _count(self, call: str) -> bool:
        self.calls[call] += 1
        return self.refused.get(call) == self.calls[call]

    def cuInit(self, flags: int) -> tuple[Any]:
        return (OK,)

    def cuDeviceGet(self, ordinal: int) -> tuple[Any, int]:
        return OK, ordinal

    def cuDevicePrimaryCtxRetain(self, device: int) -> tuple[Any, str]:
        self.calls["retain"] += 1
        return OK, "context"

    def cuDevicePrimaryCtxRelease(self, device: int) -> tuple[Any]:
        self.calls["retain"] -= 1
        return (OK,)

    def cuCtxSetCurrent(self, context: str) -> tuple[Any]:
        self.calls["cuCtxSetCurrent"] += 1
        return (OK,)

    def cuStreamCreate(self, flags: Any) -> tuple[Any, str]:
        return OK, "stream"

    def cuStreamDestroy(self, stream: str) -> tuple[Any]:
        return (OK,)

    def cuStreamSynchronize(self, stream: str) -> tuple[Any]:
        self.calls["cuStreamSynchronize"] += 1
        return (OK,)

    def cuMemGetAllocationGranularity(self, properties: Any, option: Any) -> tuple[Any, int]:
        assert properties.location.type == driver.CUmemLocationType.CU_MEM_LOCATION_TYPE_DEVICE
        return OK, GRANULE

    def cuMemAddressReserve(self, nbytes: int, alignment: int, address: int, flags: int) -> tuple[Any, Any]:
        start = (1 << 40) + next(self._numbers) * (1 << 36)
        self.reserved[start] = nbytes
        return OK, driver.CUdeviceptr(start)

    def cuMemAddressFree(self, address: int, nbytes: int) -> tuple[Any]:
        return (OK,) if self.reserved.pop(address) == nbytes else (INVALID,)

    def cuMemCreate(self, nbytes: int, properties: Any, flags: int) -> tuple[Any, Any]:
        if self._count("cuMemCreate"):
            return OUT_OF_MEMORY, None
        handle = next(self._numbers)
        self.handles.add(handle)
        return OK, driver.CUmemGenericAllocationHandle(handle)

    def cuMemRelease(self, handle: int) -> tuple[Any]:
        if self._count("cuMemRelease") or handle not in self.handles:
            return (INVALID,)
        self.handles.remove(handle)
        return (OK,)

    def cuMemMap(self, address: int, nbytes: int, offset: int, handle: int, flags: int) -> tuple[Any]:
        if self._count("cuMemMap") or address in self.mapped or handle not in self.handles:
            return (INVALID,)
        self.mapped[address] = (nbytes, handle)
        return (OK,)

    def cuMemSetAccess(self, address: int, nbytes: int, access: list[Any], count: int) -> tuple[Any]:
        if self._count("cuMemSetAccess"):
            return (INVALID,)
        self.accessible.update(self._whole_mappings(address, nbytes))
        return (OK,)

    def cuMemUnmap(self, address: int, nbytes: int) -> tuple[Any]:
        if self._count("cuMemUnmap"):
            return (INVALID,)
        for start in self._whole_mappings(address, nbytes):
            del self.mapped[start]
            self.accessible.discard(start)
        return (OK,)

    def cuMemsetD8Async(self, address: int, value: int, nbytes: int, stream: str) -> tuple[Any]:
        assert self.accessible.issuperset(self._whole_mappings(address, nbytes))
        self.scrubbed.append((address, nbytes))
        return (OK,)

    def _whole_mappings(self, address: int, nbytes: int) -> list[int]:
        """CUDA takes whole mappings without a gap, nothing else."""
        starts = []
        end = address + nbytes
        while address < end:
            starts.append(address)
            address += self.mapped[address][0]
        assert address == end
        return starts
