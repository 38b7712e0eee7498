"""Virtual memory on an NVIDIA device, through the driver's own calls.

Owns the device's primary context for the threads that use it, and a stream of its own for scrubbing. Imports
`cuda.bindings` only when a driver is opened, so that a machine without a GPU can import this room. Knows no tensor.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from typing import Any

from chimera.errors import DriverError
from chimera.vmm.driver import Handle, Run, TrackedDriver

NO_DEVICE = 100
"""CUDA_ERROR_NO_DEVICE: also said when the machine has no driver library at all."""


class CudaDriver(TrackedDriver):
    """`cuMemAddressReserve`, `cuMemCreate`, `cuMemMap` + `cuMemSetAccess`, `cuMemUnmap`, `cuMemRelease`."""

    def __init__(self, device: int = 0, *, api: Any = None) -> None:
        self._api = api if api is not None else _load()
        self._threads = threading.local()
        self._call("cuInit", 0, 0)
        self._device = self._call("cuDeviceGet", 0, device)
        # The primary context is the one torch uses; every handle below is then usable from its kernels.
        self._context = self._call("cuDevicePrimaryCtxRetain", 0, self._device)
        self._enter()
        self._properties = self._pinned_on(device)
        self._access = self._read_write()
        self._stream = self._call("cuStreamCreate", 0, self._api.CUstream_flags.CU_STREAM_NON_BLOCKING)
        recommended = self._api.CUmemAllocationGranularity_flags.CU_MEM_ALLOC_GRANULARITY_RECOMMENDED
        super().__init__(int(self._call("cuMemGetAllocationGranularity", 0, self._properties, recommended)))

    def close(self) -> None:
        super().close()
        if self._context is not None:
            self._call("cuStreamDestroy", 0, self._stream)
            self._call("cuDevicePrimaryCtxRelease", 0, self._device)
            self._context = None

    def _reserve(self, nbytes: int) -> int:
        return int(self._call("cuMemAddressReserve", nbytes, nbytes, self.granularity, 0, 0))

    def _free(self, address: int, nbytes: int) -> None:
        self._call("cuMemAddressFree", nbytes, address, nbytes)

    def _create(self, nbytes: int, count: int) -> list[int]:
        places: list[int] = []
        try:
            while len(places) < count:
                places.append(int(self._call("cuMemCreate", nbytes, nbytes, self._properties, 0)))
        except DriverError:
            for place in places:
                self._call("cuMemRelease", nbytes, place)
            raise
        return places

    def _release(self, group: Sequence[Handle]) -> None:
        for handle in group:
            self._call("cuMemRelease", handle.nbytes, handle.place)

    def _map(self, address: int, run: Run) -> None:
        done = 0
        try:
            for handle in run.handles:
                self._call("cuMemMap", handle.nbytes, address + done, handle.nbytes, 0, handle.place, 0)
                done += handle.nbytes
            # One call for the whole run: on a device it is the access, not the map, that is paid per call.
            self._call("cuMemSetAccess", run.nbytes, address, run.nbytes, [self._access], 1)
        except DriverError:
            if done:
                self._call("cuMemUnmap", done, address, done)
            raise

    def _unmap(self, address: int, run: Run) -> None:
        self._call("cuMemUnmap", run.nbytes, address, run.nbytes)

    def _scrub(self, address: int, run: Run) -> None:
        # A helper thread scrubs, and a fresh thread has no current context.
        self._enter()
        self._call("cuMemsetD8Async", run.nbytes, address, 0, run.nbytes, self._stream)
        self._call("cuStreamSynchronize", run.nbytes, self._stream)

    def _enter(self) -> None:
        if not getattr(self._threads, "entered", False):
            self._call("cuCtxSetCurrent", 0, self._context)
            self._threads.entered = True

    def _pinned_on(self, device: int) -> Any:
        properties = self._api.CUmemAllocationProp()
        properties.type = self._api.CUmemAllocationType.CU_MEM_ALLOCATION_TYPE_PINNED
        properties.location.type = self._api.CUmemLocationType.CU_MEM_LOCATION_TYPE_DEVICE
        properties.location.id = device
        return properties

    def _read_write(self) -> Any:
        access = self._api.CUmemAccessDesc()
        access.location = self._properties.location
        access.flags = self._api.CUmemAccess_flags.CU_MEM_ACCESS_FLAGS_PROT_READWRITE
        return access

    def _call(self, name: str, nbytes: int, *arguments: Any) -> Any:
        """One driver call: its value, or a DriverError that names the call, CUDA's code and the bytes."""
        try:
            code, *values = getattr(self._api, name)(*arguments)
        except RuntimeError as error:
            # cuda-bindings finds libcuda at the first call, not at import.
            raise DriverError(name, NO_DEVICE, nbytes, str(error).splitlines()[0]) from error
        if code != self._api.CUresult.CUDA_SUCCESS:
            raise DriverError(name, int(code), nbytes, getattr(code, "name", ""))
        return values[0] if values else None


def _load() -> Any:
    try:
        from cuda.bindings import driver
    except ImportError as error:
        raise DriverError("import cuda.bindings", NO_DEVICE, 0, "the package cuda-bindings is not installed") from error
    return driver
