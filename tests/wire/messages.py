"""Any message of the wire, drawn from its own type: a new message, or a new field, is tested from the day it exists."""

from __future__ import annotations

from functools import cache
from typing import Any, get_args

import msgspec.inspect as inspect
from chimera.wire.codec import Message
from hypothesis import strategies as st

KINDS: tuple[type, ...] = get_args(Message)

_TEXT = st.text(st.characters(codec="utf-8"), max_size=12)
_INTEGERS = st.one_of(st.integers(-3, 300), st.integers(-(2**63), 2**64 - 1))
_FLOATS = st.floats(allow_nan=False)
_LEAVES = st.one_of(st.none(), st.booleans(), _INTEGERS, _FLOATS, _TEXT)
_ANYTHING = st.recursive(
    _LEAVES, lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(_TEXT, inner, max_size=3)), max_leaves=6
)


def messages() -> st.SearchStrategy[Message]:
    return st.sampled_from(KINDS).flatmap(message)


@cache
def message(kind: type) -> st.SearchStrategy[Any]:
    return _drawn(inspect.type_info(kind))


def _drawn(kind: inspect.Type) -> st.SearchStrategy[Any]:
    match kind:
        case inspect.StructType(cls=cls, fields=fields):
            return st.builds(cls, **{field.name: _drawn(field.type) for field in fields})
        case inspect.ListType(item_type=item):
            return st.lists(_drawn(item), max_size=4)
        case inspect.VarTupleType(item_type=item):
            return st.lists(_drawn(item), max_size=4).map(tuple)
        case inspect.TupleType(item_types=items):
            return st.tuples(*map(_drawn, items))
        case inspect.DictType(key_type=key, value_type=value):
            return st.dictionaries(_drawn(key), _drawn(value), max_size=4)
        case inspect.UnionType(types=types):
            return st.one_of(*map(_drawn, types))
        case inspect.EnumType(cls=cls):
            return st.sampled_from(list(cls))
        case inspect.AnyType():
            return _ANYTHING
        case inspect.NoneType():
            return st.none()
        case inspect.BoolType():
            return st.booleans()
        case inspect.IntType():
            return _INTEGERS
        case inspect.FloatType():
            return _FLOATS
        case inspect.StrType():
            return _TEXT
        case inspect.BytesType():
            return st.binary(max_size=40)
    raise NotImplementedError(f"no strategy draws a {kind}: add it here")
