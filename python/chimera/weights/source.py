"""The files a model is built from: their identity, and whether they are what their headers say.

Reads headers, never tensors. A checkpoint that lies is found out here, in milliseconds, before any engine reads it.
"""

from __future__ import annotations

import json
import os
import struct
from collections.abc import Iterator, Mapping
from math import prod
from pathlib import Path
from typing import Any

import msgspec

from chimera.errors import WeightsError
from chimera.units import MIB, format_bytes

LARGEST_HEADER_BYTES = 100 * MIB
"""The format's own bound."""

_READ_BY_ENGINES = (".safetensors", ".json", ".model", ".bin", ".pt", ".gguf")
_ELEMENT_BITS = {
    **dict.fromkeys(("F64", "I64", "U64", "C64"), 64),
    **dict.fromkeys(("F32", "I32", "U32"), 32),
    **dict.fromkeys(("F16", "BF16", "I16", "U16"), 16),
    **dict.fromkeys(("F8_E4M3", "F8_E5M2", "F8_E8M0", "F8_E4M3FNUZ", "F8_E5M2FNUZ", "I8", "U8", "BOOL"), 8),
    **dict.fromkeys(("F6_E2M3", "F6_E3M2"), 6),
    "F4": 4,
}


class FileStamp(msgspec.Struct, frozen=True, array_like=True, order=True):
    """One file as it was; written over, replaced or touched, it is another."""

    name: str
    nbytes: int
    modified_ns: int
    inode: int


def stamps(folder: Path) -> tuple[FileStamp, ...]:
    """Every file of the checkpoint that an engine may read, links followed."""
    found = []
    for entry in os.scandir(folder):
        if entry.name.endswith(_READ_BY_ENGINES) and entry.is_file():
            status = entry.stat()
            found.append(FileStamp(entry.name, status.st_size, status.st_mtime_ns, status.st_ino))
    return tuple(sorted(found))


def require_sound(folder: Path) -> int:
    """How many elements the checkpoint's tensors have. WeightsError names the first safetensors file that is cut short or
    contradicts itself, or the tensor that is missing."""
    tensors = {path.name: dict(_tensors(path)) for path in sorted(folder.glob("*.safetensors"))}
    _require_indexed(folder / "model.safetensors.index.json", tensors)
    return sum(sum(file.values()) for file in tensors.values())


def _require_indexed(index: Path, tensors: Mapping[str, Mapping[str, int]]) -> None:
    if not index.is_file():
        return
    try:
        weight_map = dict(json.loads(index.read_bytes())["weight_map"])
    except (OSError, ValueError, KeyError, TypeError) as fault:
        raise WeightsError(f"{index}: not an index of safetensors files: {fault}") from fault
    for tensor, file in weight_map.items():
        if tensor not in tensors.get(file, ()):
            raise WeightsError(f"{index}: {tensor} should be in {file}, which does not have it")


def _tensors(path: Path) -> Iterator[tuple[str, int]]:
    """The names in one file with their elements, each seen to have its bytes."""
    file_bytes = path.stat().st_size
    header, at = _header(path, file_bytes)
    end = 0
    spans = []
    for name, said in header.items():
        if name == "__metadata__":
            continue
        begin, stop = _span(path, name, said)
        spans.append((begin, stop, name))
        end = max(end, stop)
        yield name, prod(said["shape"])
    if at + end != file_bytes:
        held = format_bytes(file_bytes)
        raise WeightsError(f"{path}: its header speaks of {at + end} bytes and the file has {file_bytes} ({held}): cut short?")
    expected = 0
    for begin, stop, name in sorted(spans):
        if begin != expected:
            raise WeightsError(f"{path}: {name} begins at byte {begin} and the tensor before it ends at {expected}")
        expected = stop


def _header(path: Path, file_bytes: int) -> tuple[dict[str, Any], int]:
    with path.open("rb") as file:
        prefix = file.read(8)
        if len(prefix) < 8:
            raise WeightsError(f"{path}: {file_bytes} bytes are no safetensors file")
        (length,) = struct.unpack("<Q", prefix)
        if length > min(LARGEST_HEADER_BYTES, file_bytes - 8):
            raise WeightsError(f"{path}: its header should have {length} bytes and the file has {file_bytes}: cut short?")
        text = file.read(length)
    try:
        header = json.loads(text)
    except (ValueError, RecursionError) as fault:
        raise WeightsError(f"{path}: its header is not JSON: {fault}") from fault
    if not isinstance(header, dict):
        raise WeightsError(f"{path}: its header is not a JSON object")
    return header, 8 + length


def _span(path: Path, name: str, said: Any) -> tuple[int, int]:
    try:
        dtype, shape, (begin, stop) = said["dtype"], said["shape"], said["data_offsets"]
        bits = prod(int(n) for n in shape) * _ELEMENT_BITS[dtype]
        sane = 0 <= begin <= stop and all(n >= 0 for n in shape) and bits == 8 * (stop - begin)
    except (KeyError, TypeError, ValueError) as fault:
        raise WeightsError(f"{path}: what it says of {name} makes no sense: {fault!r}") from fault
    if not sane:
        raise WeightsError(f"{path}: {name} is {dtype} {shape}, which does not fill the bytes {begin} to {stop}")
    return begin, stop
