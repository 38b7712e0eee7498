"""What is written down of an operator's word: a row that its readers can read, whatever part of it was left out."""

from __future__ import annotations

import msgspec
import pytest
from chimera.core.record import Entry
from chimera.msg.events import PolicyChosen
from chimera.records.scribe import Row, Scribe


@pytest.mark.parametrize(
    ("policy", "local", "code", "reason"),
    [
        ("flexible", None, "flexible", "an operator chose the policy flexible"),
        (None, "fcfs", "fcfs", "an operator chose requests by fcfs"),
        ("static", "slack", "static", "an operator chose the policy static and requests by slack"),
    ],
)
def test_a_choice_of_policy_or_order_is_one_entry(policy: str | None, local: str | None, code: str, reason: str) -> None:
    kept: list[Row] = []
    Scribe(kept.append).step(PolicyChosen(policy=policy, local=local), [], 1.0)
    (entry,) = kept
    assert msgspec.msgpack.decode(msgspec.msgpack.encode(entry), type=Entry) == entry
    assert isinstance(entry, Entry) and (entry.what, entry.code, entry.reason) == ("policy", code, reason)
