"""Prism's `real_trace.pkl`, and how its benchmark deals the adapters in it out to models.

A pickle is a program. The unpickler here knows a handful of names and stands plain data in for each, so that the program
can fill in records and do nothing else: whatever it asks for beyond them is refused by name.
"""

from __future__ import annotations

import math
import pickle
import struct
from collections.abc import Sequence
from typing import IO, Any, NoReturn

from chimera.errors import ConfigError
from chimera.trace.trace import Row, Trace

ADAPTERS_OF_18 = (5, 10, 4, 17, 2, 10, 23, 2, 10, 14, 19, 14, 18, 14, 21, 2, 6, 19)
"""model_1 … model_18 of Prism's large benchmark. An adapter that is there again is a copy, shifted in time."""
ADAPTERS_OF_8 = (2, 14, 3, 10, 5, 19, 23, 24)
"""model_1 … model_8, when models are named on the command line."""
_LATER, _EARLIER = frozenset({2, 10}), frozenset({14, 19})
_SHIFT_S = 10.0
_CODES = {"f8": "d", "f4": "f", "i8": "q", "i4": "i", "i2": "h", "u8": "Q", "u4": "I"}
_FIELDS = ("adapter_dir", "prompt_len", "output_len", "req_time")


class _Sealed(type):
    """A class that a pickle cannot change."""

    def __setattr__(cls, name: str, value: object) -> NoReturn:
        raise pickle.UnpicklingError(f"the file changes {cls.__name__}.{name}")


class _Record(metaclass=_Sealed):
    """Stands in for a request of any module: the fields that are read, and nothing to call."""

    __slots__ = _FIELDS

    def __setstate__(self, state: object) -> None:
        for part in state if isinstance(state, tuple) else (state,):
            for name in _FIELDS if isinstance(part, dict) else ():
                if name in part:
                    setattr(self, name, part[name])


class _Kind(metaclass=_Sealed):
    """Stands in for numpy's dtype: the code of a plain number."""

    __slots__ = ("code", "order")

    def __init__(self, code: object = "", *_: object) -> None:
        self.code = code if isinstance(code, str) else ""
        self.order = "<"

    def __setstate__(self, state: object) -> None:
        if isinstance(state, tuple) and len(state) > 1 and state[1] == ">":
            self.order = ">"


def _scalar(kind: object, data: object = b"") -> float | int:
    """Stands in for numpy's scalars. Old protocols spell bytes as text."""
    raw = data.encode("latin-1") if isinstance(data, str) else data
    if not isinstance(kind, _Kind) or kind.code not in _CODES or not isinstance(raw, bytes):
        raise pickle.UnpicklingError("a number of a kind that a trace has not")
    try:
        number: float | int = struct.unpack(kind.order + _CODES[kind.code], raw)[0]
    except struct.error as fault:
        raise pickle.UnpicklingError(str(fault)) from None
    return number


def _rebuilt(made: object, *_: object) -> object:
    """Stands in for what old protocols make an object with."""
    if made is not _Record:
        raise pickle.UnpicklingError("an object that is no request")
    return _Record()


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if name == "Request":
            return _Record
        match module, name:
            case ("numpy", "dtype"):
                return _Kind
            case ("numpy.core.multiarray" | "numpy._core.multiarray", "scalar"):
                return _scalar
            case ("copyreg" | "copy_reg", "_reconstructor"):
                return _rebuilt
            case ("builtins" | "__builtin__", "object"):
                return None
        raise pickle.UnpicklingError(f"it asks for {module}.{name}; only plain data is read")

    def persistent_load(self, pid: Any) -> NoReturn:
        raise pickle.UnpicklingError("it refers to something outside itself")


def rows(source: str, file: IO[bytes]) -> list[Row]:
    """Every request in order of time, its model named `adapter-N`."""
    try:
        document = _Unpickler(file).load()
    except ConfigError:
        raise
    except Exception as fault:  # noqa: BLE001 - a broken pickle fails in whatever it was made to call
        raise ConfigError.single(source, f"is refused as a trace: {fault}") from None
    if not isinstance(document, tuple | list) or len(document) < 2 or not isinstance(document[1], Sequence):
        raise ConfigError.single(source, "is not Prism's trace: a list of adapters, and one of requests")
    found = [_row(source, f"request {number}", record) for number, record in enumerate(document[1], start=1)]
    return sorted(found, key=lambda row: row.at_s)


def _row(source: str, where: str, record: object) -> Row:
    match [getattr(record, name, None) for name in _FIELDS] if isinstance(record, _Record) else ():
        case [str(adapter), int(prompt), int(output), int() | float() as at_s]:
            number = adapter.rpartition("-")[2]
            if number.isdigit() and math.isfinite(at_s) and at_s >= 0 and prompt >= 1 and output >= 1:
                return Row(float(at_s), f"adapter-{number}", prompt, output)
    raise ConfigError.single(source, "is no request with an adapter, a time and lengths", where=where)


def dealt(trace: Trace, adapters: Sequence[int], models: Sequence[str] = ()) -> Trace:
    """The trace as Prism's benchmark replays it: model_1 … model_N stand for these adapters, copies shifted by 10 s each.

    `models` keeps only those. Requests that a shift puts before the beginning are sent at the beginning.
    """
    places: dict[str, list[tuple[str, float]]] = {}
    seen: dict[int, int] = {}
    for number, adapter in enumerate(adapters, start=1):
        copy = seen.get(adapter, 0)
        seen[adapter] = copy + 1
        sign = 1 if adapter in _LATER else -1 if adapter in _EARLIER else 0
        name = f"model_{number}"
        if not models or name in models:
            places.setdefault(f"adapter-{adapter}", []).append((name, sign * copy * _SHIFT_S))
    made = [
        Row(max(0.0, row.at_s + shift_s), name, row.prompt_tokens, row.output_tokens)
        for row in trace.rows
        for name, shift_s in places.get(row.model, ())
    ]
    return Trace(trace.source, tuple(sorted(made, key=lambda row: row.at_s)))
