"""3. Which tensors live over a reserved, partly mapped range, and how fast they are.

Decides how the pools build their tensors, whether a kernel feels the size of the handles that it reads through, and the point
on which the design rests: a captured graph goes on reading a pool while other stripes of it are mapped and unmapped.
"""

from __future__ import annotations

import ctypes
import math
import sys
import traceback
from collections.abc import Callable
from types import SimpleNamespace

import torch
from chimera.vmm.driver import Driver, Range

from benchmark.gpu.answer import Answer
from benchmark.gpu.device import Device, device

MIB = 1 << 20
ROW_BYTES = 2048
"""One token's keys in one layer of an 8B: 8 heads × 128 × 2 bytes."""

PASSES = 8
"""How often a captured step reads its stripe: long enough for something to happen beside it."""

Build = Callable[[int, tuple[int, ...], torch.dtype, torch.device], torch.Tensor]


def answer(answer: Answer, *, rehearse: bool) -> None:
    where = device(rehearse=rehearse)
    driver = _driver(rehearse=rehearse)
    stripe = (2 if rehearse else 64) * MIB
    build = constructions(answer, driver, where, stripe)
    if build is None:
        raise RuntimeError("no construction works: what follows has no tensor to look at")
    for handle_mib in (2,) if rehearse else (2, 16, 64, 512):
        bandwidth(answer, driver, where, build, handle_mib * MIB, (32 if rehearse else 8192) * MIB)
    graph_beside_mapping(answer, driver, where, build, stripe)


def _driver(*, rehearse: bool) -> Driver:
    if rehearse:
        from chimera.vmm.host import HostDriver

        return HostDriver()
    from chimera.vmm.cuda import CudaDriver

    return CudaDriver()


# The ways to a tensor over memory that torch did not allocate.


def from_storage(address: int, shape: tuple[int, ...], dtype: torch.dtype, place: torch.device) -> torch.Tensor:
    """A storage that does not own its bytes: what SGLang's own virtual-memory backing uses."""
    nbytes = math.prod(shape) * dtype.itemsize
    storage = torch._C._construct_storage_from_data_pointer(address, place, nbytes)
    return torch.empty(0, dtype=dtype, device=place).set_(storage, 0, shape)


def from_array_interface(address: int, shape: tuple[int, ...], dtype: torch.dtype, place: torch.device) -> torch.Tensor:
    """CUDA's array interface has no bfloat16, and torch asks the driver about the first byte: it must be mapped."""
    if place.type == "cpu":
        flat = (ctypes.c_uint8 * (math.prod(shape) * dtype.itemsize)).from_address(address)
        return torch.frombuffer(flat, dtype=dtype).view(shape)
    described = {
        "shape": (math.prod(shape) * dtype.itemsize,),
        "typestr": "|u1",
        "data": (address, False),
        "version": 3,
        "strides": None,
    }
    return torch.as_tensor(SimpleNamespace(__cuda_array_interface__=described), device=place).view(dtype).view(shape)


class _DLTensor(ctypes.Structure):
    _fields_ = (
        ("data", ctypes.c_void_p),
        ("device_type", ctypes.c_int32),
        ("device_id", ctypes.c_int32),
        ("dimensions", ctypes.c_int32),
        ("code", ctypes.c_uint8),
        ("bits", ctypes.c_uint8),
        ("lanes", ctypes.c_uint16),
        ("shape", ctypes.POINTER(ctypes.c_int64)),
        ("strides", ctypes.POINTER(ctypes.c_int64)),
        ("byte_offset", ctypes.c_uint64),
    )


class _DLManaged(ctypes.Structure):
    _fields_ = (("tensor", _DLTensor), ("context", ctypes.c_void_p), ("deleter", ctypes.c_void_p))


_held: list[object] = []
"""What a capsule points to. With no deleter (a ctypes one would run after the interpreter has ended) nobody else keeps it."""


def from_dlpack(address: int, shape: tuple[int, ...], dtype: torch.dtype, place: torch.device) -> torch.Tensor:
    """A capsule built by hand; it carries bfloat16, and nobody looks at the memory."""
    codes = {torch.bfloat16: 4, torch.float16: 2, torch.float32: 2}
    dimensions = (ctypes.c_int64 * len(shape))(*shape)
    managed = _DLManaged()
    tensor = managed.tensor
    tensor.data, tensor.device_type, tensor.device_id = address, 2 if place.type == "cuda" else 1, place.index or 0
    tensor.dimensions, tensor.shape, tensor.strides = len(shape), dimensions, None
    tensor.code, tensor.bits, tensor.lanes, tensor.byte_offset = codes[dtype], dtype.itemsize * 8, 1, 0
    _held.append((managed, dimensions))
    capsule = ctypes.pythonapi.PyCapsule_New
    capsule.restype, capsule.argtypes = ctypes.py_object, (ctypes.c_void_p, ctypes.c_char_p, ctypes.c_void_p)
    return torch.utils.dlpack.from_dlpack(capsule(ctypes.addressof(managed), b"dltensor", None))


CONSTRUCTIONS: dict[str, Build] = {
    "storage from a pointer": from_storage,
    "dlpack": from_dlpack,
    "array interface": from_array_interface,
}


def constructions(answer: Answer, driver: Driver, where: Device, stripe: int) -> Build | None:
    """Each way over the whole range, of which only the second half is mapped; the first that works."""
    working: Build | None = None
    for name, build in CONSTRUCTIONS.items():
        pool = driver.reserve(4 * stripe)
        # The array interface is refused without a first page; the others must do without one.
        first_mapped = 0 if build is from_array_interface else 2
        mapped = range(first_mapped * stripe, 4 * stripe, stripe)
        driver.map(pool, dict(zip(mapped, driver.create(stripe, len(mapped)), strict=True)))
        try:
            rows = build(pool.address, (4 * stripe // ROW_BYTES, ROW_BYTES // 2), torch.bfloat16, where.torch)
            written = rows[first_mapped * stripe // ROW_BYTES :]
            pattern = torch.arange(written.numel(), device=where.torch).remainder(251).to(torch.bfloat16).view(written.shape)
            written.copy_(pattern)
            same = torch.equal(written, pattern) and rows.data_ptr() == pool.address
        except (RuntimeError, TypeError, AttributeError, ValueError) as error:
            print(traceback.format_exc(), file=sys.stderr)
            answer.fact(f"tensor by {name}", f"{type(error).__name__}: {error}".splitlines()[0])
        else:
            answer.fact(f"tensor by {name}", "works" if same else "reads back something else")
            working = working or (build if same else None)
        where.synchronize()
        driver.release(driver.unmap(pool, mapped))
        driver.free(pool)
    return working


def bandwidth(answer: Answer, driver: Driver, where: Device, build: Build, handle: int, total: int) -> None:
    """The same reads from a plain allocation and through handles of one size: end to end, and row by row at random."""
    shape = (total // ROW_BYTES, ROW_BYTES // 2)
    pool = driver.reserve(total)
    offsets = range(0, total, handle)
    driver.map(pool, dict(zip(offsets, driver.create(handle, len(offsets)), strict=True)))
    mapped = build(pool.address, shape, torch.bfloat16, where.torch)
    plain = torch.empty(shape, dtype=torch.bfloat16, device=where.torch)
    picked = torch.randint(shape[0], (shape[0] // 2,), device=where.torch)
    sink = torch.empty_like(plain)
    gathered = sink[: len(picked)]
    for rows in (plain, mapped):
        rows.normal_()
    speeds: dict[str, dict[str, float]] = {"copy": {}, "gather": {}}
    for name, rows in (("plain", plain), ("mapped", mapped)):
        copies = where.seconds(lambda rows=rows: sink.copy_(rows), 10)  # type: ignore[misc]
        gathers = where.seconds(lambda rows=rows: torch.index_select(rows, 0, picked, out=gathered), 10)  # type: ignore[misc]
        what = name if name == "plain" else f"through {handle // MIB} MiB handles"
        answer.samples(f"copy, {what}", [2 * total / 1e9 / s for s in copies], "GB/s")
        answer.samples(f"gather of 2 KiB rows, {what}", [2 * gathered.numel() * 2 / 1e9 / s for s in gathers], "GB/s")
        speeds["copy"][name], speeds["gather"][name] = min(copies), min(gathers)
    for work, best in speeds.items():
        answer.figure(f"{work} through {handle // MIB} MiB handles, against plain", best["plain"] / best["mapped"], "×")
    where.synchronize()
    _give_back(driver, pool)


def graph_beside_mapping(answer: Answer, driver: Driver, where: Device, build: Build, stripe: int) -> None:
    """A graph captured over the pool's first stripe: replayed while others come and go, then told to read one that came."""
    stripes, rows_each = 16, stripe // ROW_BYTES
    pool = driver.reserve(stripes * stripe)
    driver.map(pool, {0: driver.create(stripe)[0]})
    rows = build(pool.address, (stripes * rows_each, ROW_BYTES // 2), torch.bfloat16, where.torch)
    rows[:rows_each].fill_(1)
    slots = torch.arange(rows_each, device=where.torch)
    picked = torch.empty(rows_each, ROW_BYTES // 2, dtype=torch.bfloat16, device=where.torch)
    total = torch.zeros((), dtype=torch.float64, device=where.torch)

    def step() -> None:
        for _ in range(PASSES):
            torch.index_select(rows, 0, slots, out=picked)
        total.copy_(picked.sum(dtype=torch.float64))

    replay = where.captured(step)
    expected = float(picked.numel())
    replay()
    answer.fact("a graph over a partly mapped range reads right", total.item() == expected)

    alone_s = min(where.seconds(replay, 20))
    replays = max(4, min(500, int(0.5 / alone_s)))
    spare = driver.create(stripe, stripes - 1)
    others = [at * stripe for at in range(1, stripes)]
    running = where.start(lambda: [replay() for _ in range(replays)])
    rounds = 0
    while rounds < 20:
        driver.map(pool, dict(zip(others, spare, strict=True)))
        spare = driver.unmap(pool, others)
        rounds += 1
        if running.done():
            break
    beside_s = running.seconds() / replays
    answer.figure(f"rounds of mapping and unmapping {stripes - 1} stripes beside the graph", rounds, "")
    answer.figure("a graph's step while stripes come and go, against alone", beside_s / alone_s, "×")
    answer.fact("the graph still reads right", total.item() == expected)

    driver.map(pool, dict(zip(others, spare, strict=True)))
    rows[rows_each : 2 * rows_each].fill_(2)
    slots.add_(rows_each)
    replay()
    answer.fact("the same graph reads a stripe mapped after its capture", total.item() == 2 * expected)
    where.synchronize()
    _give_back(driver, pool)


def _give_back(driver: Driver, pool: Range) -> None:
    driver.release(driver.unmap(pool, list(pool.mapped)))
    driver.free(pool)
