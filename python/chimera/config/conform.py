"""Holds plain values against a Struct type and names every difference, where `msgspec.convert` stops at the first.

The Struct is the schema: this module knows the kinds of types that msgspec describes, and no field by name.
A faulty value is replaced by the field's default or by an empty one, so that the rest can still be judged.
"""

from __future__ import annotations

import re
from typing import Any, TypeVar

from msgspec import inspect

from chimera.config.faults import Faults, at_index, at_key, nearest, shortened

T = TypeVar("T")


def conform(value: Any, wanted: type[T], where: str, faults: Faults) -> T:
    """Always a value of the wanted type; trust it only where `faults` says nothing."""
    conformed: T = _walk(value, inspect.type_info(wanted), where, faults)
    return conformed


def _walk(value: Any, wanted: inspect.Type, where: str, faults: Faults) -> Any:
    wanted = _bare(wanted)
    if isinstance(wanted, inspect.UnionType):
        member = next((member for member in map(_bare, wanted.types) if _is_kind(value, member)), None)
        if member is None:
            return _refuse(value, wanted, where, faults)
        return _walk(value, member, where, faults)
    if not _is_kind(value, wanted):
        return _refuse(value, wanted, where, faults)
    match wanted:
        case inspect.StructType():
            return _walk_struct(value, wanted, where, faults)
        case inspect.VarTupleType():
            return tuple(_walk(item, wanted.item_type, at_index(where, index), faults) for index, item in enumerate(value))
        case inspect.DictType():
            return {key: _walk(item, wanted.value_type, at_key(where, key), faults) for key, item in value.items()}
        case inspect.LiteralType() if value not in wanted.values:
            known = [str(word) for word in wanted.values]
            faults.add(where, f"{shortened(value)!r} is not one of {', '.join(known)}", nearest(value, known))
            return wanted.values[0]
        case inspect.StrType():
            return _walk_text(value, wanted, where, faults)
        case inspect.IntType() | inspect.FloatType():
            return _walk_number(value, wanted, where, faults)
    return value


def _walk_struct(value: dict[str, Any], wanted: inspect.StructType, where: str, faults: Faults) -> Any:
    known = {field.encode_name: field for field in wanted.fields}
    for key in value:
        if key not in known:
            faults.add(at_key(where, key), "unknown key", nearest(key, known))
    filled = {}
    for key, field in known.items():
        if key in value:
            filled[field.name] = _walk(value[key], field.type, at_key(where, key), faults)
        elif field.required:
            faults.add(at_key(where, key), "is missing", f"it is {_described(field.type)}")
            filled[field.name] = _empty(field.type)
    return wanted.cls(**filled)


def _walk_text(value: str, wanted: inspect.StrType, where: str, faults: Faults) -> str:
    if wanted.min_length is not None and len(value) < wanted.min_length:
        faults.add(where, "is empty" if not value else f"is shorter than {wanted.min_length} characters")
    elif wanted.max_length is not None and len(value) > wanted.max_length:
        faults.add(where, f"is longer than {wanted.max_length} characters")
    elif wanted.pattern is not None and not re.fullmatch(wanted.pattern, value):
        faults.add(where, f"{shortened(value)!r} does not match {wanted.pattern}")
    return value


def _walk_number(value: float, wanted: inspect.IntType | inspect.FloatType, where: str, faults: Faults) -> float:
    broken = (
        (wanted.ge is not None and value < wanted.ge and f"less than {wanted.ge:g}")
        or (wanted.gt is not None and value <= wanted.gt and f"not more than {wanted.gt:g}")
        or (wanted.le is not None and value > wanted.le and f"more than {wanted.le:g}")
    )
    if broken:
        faults.add(where, f"{value:g} is {broken}")
    return float(value) if isinstance(wanted, inspect.FloatType) else value


def _refuse(value: Any, wanted: inspect.Type, where: str, faults: Faults) -> Any:
    faults.add(where, f"expected {_described(wanted)}, found {_found(value)}")
    return _empty(wanted)


def _bare(wanted: inspect.Type) -> inspect.Type:
    return _bare(wanted.type) if isinstance(wanted, inspect.Metadata) else wanted


def _is_kind(value: Any, wanted: inspect.Type) -> bool:
    match wanted:
        case inspect.AnyType():
            return True
        case inspect.NoneType():
            return value is None
        case inspect.BoolType():
            return isinstance(value, bool)
        case inspect.IntType():
            return isinstance(value, int) and not isinstance(value, bool)
        case inspect.FloatType():
            return isinstance(value, int | float) and not isinstance(value, bool)
        case inspect.StrType() | inspect.LiteralType():
            return isinstance(value, str)
        case inspect.VarTupleType():
            return isinstance(value, list)
        case inspect.StructType() | inspect.DictType():
            return isinstance(value, dict)
    raise TypeError(f"{wanted} has no place in a configuration file")


def _described(wanted: inspect.Type) -> str:
    wanted = _bare(wanted)
    match wanted:
        case inspect.UnionType():
            return " or ".join(_described(member) for member in wanted.types)
        case inspect.LiteralType():
            return "one of " + ", ".join(map(str, wanted.values))
        case inspect.VarTupleType():
            return "a list"
    words = {
        inspect.NoneType: "null",
        inspect.BoolType: "true or false",
        inspect.IntType: "a whole number",
        inspect.FloatType: "a number",
        inspect.StrType: "text",
    }
    return words.get(type(wanted), "an object")


def _found(value: Any) -> str:
    match value:
        case None:
            return "null"
        case bool():
            return "true" if value else "false"
        case int() | float():
            return f"the number {value}"
        case str():
            return f"the text {shortened(value)!r}"
        case list():
            return "a list"
    return "an object"


def _empty(wanted: inspect.Type) -> Any:
    wanted = _bare(wanted)
    match wanted:
        case inspect.UnionType():
            return None if wanted.includes_none else _empty(wanted.types[0])
        case inspect.LiteralType():
            return wanted.values[0]
        case inspect.VarTupleType():
            return ()
        case inspect.StructType():
            return wanted.cls(**{field.name: _empty(field.type) for field in wanted.fields if field.required})
    plain: dict[type[inspect.Type], Any] = {inspect.BoolType: False, inspect.IntType: 0, inspect.FloatType: 0.0}
    plain |= {inspect.StrType: "", inspect.DictType: {}}
    return plain.get(type(wanted))
