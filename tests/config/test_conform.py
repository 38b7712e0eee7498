"""Holding values against a Struct agrees with msgspec about what is right, and says more about what is wrong."""

from typing import Annotated, Any, Literal

import msgspec
import pytest
from chimera.config.conform import conform
from chimera.config.faults import Faults
from chimera.config.placement_file import ModelEntry, PlacementFile
from hypothesis import given, settings
from hypothesis import strategies as st


class Inner(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    sizes: tuple[Annotated[int, msgspec.Meta(ge=0, le=9)], ...]
    share: Annotated[float, msgspec.Meta(gt=0)] = 0.5


class Outer(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    name: Annotated[str, msgspec.Meta(min_length=1, max_length=4, pattern=r"^\S+$")]
    inner: Inner | None = None
    colour: Literal["red", "blue"] = "red"
    when: str | float | None = None
    on: bool = True
    extra: dict[str, Any] = {}
    spelt: str = msgspec.field(default="", name="$spelt")


def faults_of(value: Any, wanted: Any = Outer) -> list[str]:
    faults = Faults("test")
    conform(value, wanted, "", faults)
    return [str(fault) for fault in faults.error().faults]


def test_a_right_value_becomes_the_struct() -> None:
    value = {"name": "a", "inner": {"sizes": [1, 2]}, "when": 3, "extra": {"x": [1]}, "$spelt": "y"}
    faults = Faults("test")
    assert conform(value, Outer, "", faults) == msgspec.convert(value, Outer)
    assert not faults


def test_every_difference_is_named_with_its_place() -> None:
    value = {"name": "a b", "inner": {"sizes": [1, "2", -3, True], "shaer": 1}, "colour": "rde", "on": None, "when": []}
    assert faults_of(value) == [
        "name: 'a b' does not match ^\\S+$",
        "inner.shaer: unknown key (did you mean share?)",
        "inner.sizes[1]: expected a whole number, found the text '2'",
        "inner.sizes[2]: -3 is less than 0",
        "inner.sizes[3]: expected a whole number, found true",
        "colour: 'rde' is not one of blue, red (did you mean red?)",
        "when: expected text or a number or null, found a list",
        "on: expected true or false, found null",
    ]


def test_missing_keys_say_what_they_are() -> None:
    assert faults_of({}) == ["name: is missing (it is text)"]
    assert faults_of({"name": "a", "inner": {}}) == ["inner.sizes: is missing (it is a list)"]


def test_a_key_that_is_no_word_is_quoted_in_the_place() -> None:
    assert faults_of({"name": "a", "x\n.y": 1}) == ['["x\\n.y"]: unknown key']


def test_a_document_of_nothing_but_faults_is_not_read_to_its_end() -> None:
    with pytest.raises(Exception, match="more than 100 faults"):
        faults_of({"name": "a", **{f"k{n}": n for n in range(500)}})


values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-3, 12)
    | st.floats(-2, 2)
    | st.sampled_from(["", "a", "a b", "a\n", "red", "long name"]),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(["name", "sizes", "share", "x"]), inner, max_size=3)
    ),
    max_leaves=8,
)
outers = st.fixed_dictionaries(
    {"name": st.just("a") | values},
    optional={
        "inner": values | st.fixed_dictionaries({"sizes": st.lists(st.integers(0, 9))}),
        "colour": st.sampled_from(["red", "blue"]) | values,
        "when": values,
        "on": st.booleans() | values,
        "extra": values,
        "other": values,
    },
)


@settings(max_examples=150, deadline=None)
@given(outers | values)
def test_it_finds_fault_exactly_where_msgspec_does(value: Any) -> None:
    try:
        expected = msgspec.convert(value, Outer)
    except msgspec.ValidationError:
        assert faults_of(value)
    else:
        # `$` in a pattern lets a last line end pass in msgspec; here the whole text has to match.
        assert faults_of(value) == [] or expected.name.endswith("\n")


def test_every_type_of_the_schema_can_be_held_against() -> None:
    """A new kind of field would be a TypeError here, not at an operator's."""
    entry = dict.fromkeys(ModelEntry.__struct_fields__, object())
    assert len(faults_of({"models": [entry]}, PlacementFile)) == len(entry)
