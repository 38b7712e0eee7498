"""Which time is a step's."""

from __future__ import annotations

import pytest
from chimera.core.replica import Epoch, ReplicaId
from chimera.worker.stopwatch import TOLD_EVERY_S, Stopwatch


@pytest.fixture
def watch() -> Stopwatch:
    watch = Stopwatch(ReplicaId("m"), Epoch(1, 1))
    watch.let_go(10.0)
    return watch


def decode(watch: Stopwatch, now_s: float) -> None:
    watch.step(now_s, tokens=2, context_tokens=50, prompts=0, prompt_tokens=0)


def test_prompts_and_decodes_are_told_apart(watch: Stopwatch) -> None:
    watch.step(10.3, tokens=1, context_tokens=20, prompts=2, prompt_tokens=64)
    decode(watch, 10.4)
    decode(watch, 10.5)
    told = watch.told(10.0 + TOLD_EVERY_S)
    assert told is not None and (told.prompts, told.prompt_tokens, told.decode_steps) == (2, 64, 2)
    assert (told.decode_tokens, told.context_tokens) == (4, 100)
    assert (told.prompt_s, told.decode_s) == (pytest.approx(0.3), pytest.approx(0.2))


def test_waiting_belongs_to_no_step(watch: Stopwatch) -> None:
    decode(watch, 10.1)
    watch.hold()
    watch.let_go(15.0)
    decode(watch, 15.1)
    told = watch.told(15.1)
    assert told is not None and told.decode_s == pytest.approx(0.2)


def test_a_step_that_nobody_saw_begin_is_not_counted() -> None:
    watch = Stopwatch(ReplicaId("m"), Epoch(1, 1))
    decode(watch, 10.1)
    assert watch.told(12.0) is None


def test_it_tells_once_a_second_and_each_thing_once(watch: Stopwatch) -> None:
    decode(watch, 10.1)
    assert watch.told(10.1) is not None, "never told before"
    decode(watch, 10.2)
    assert watch.told(10.3) is None
    told = watch.told(10.1 + TOLD_EVERY_S)
    assert told is not None and told.decode_steps == 1
    assert watch.told(20.0) is None
