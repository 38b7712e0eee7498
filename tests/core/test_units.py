"""Spellings of time that people and clients use."""

from __future__ import annotations

import pytest
from chimera.units import parse_stay


@pytest.mark.parametrize(
    ("written", "seconds"),
    [
        ("5m", 300.0),
        ("1h30m", 5400.0),
        ("30", 30.0),
        ("-1", -1.0),
        ("-1m", -60.0),
        ("0", 0.0),
        ("250ms", 0.25),
        ("1.5h", 5400.0),
    ],
)
def test_a_stay_is_written_as_ollamas_users_write_it(written: str, seconds: float) -> None:
    assert parse_stay(written) == seconds


@pytest.mark.parametrize("written", ["", "-", "a while", "5m!", "1.2.3s", "5 parsecs", "--1"])
def test_what_is_no_duration_is_refused(written: str) -> None:
    with pytest.raises(ValueError, match=r"duration"):
        parse_stay(written)
