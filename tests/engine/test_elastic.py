"""Real SGLang on a lease that moves: the same tokens, the same prefixes, and nothing aborted."""

import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from chimera.core.model import ModelSpec
from chimera.core.replica import Epoch
from chimera.msg import actions
from chimera.tiny.maker import make
from chimera.tiny.shapes import MODELS
from chimera.units import KIB

from tests.engine.crowd import Crowd, Wish, wishes
from tests.engine.reference import departures
from tests.worker.stage import Hired, Stage, model

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("default")]

ARCHITECTURES = ("llama", "qwen3", "gemma2", "mistral", "moe")
TOKEN_BYTES = 3 * KIB
PAGE_BYTES = 64 * TOKEN_BYTES
"""Pages of 64 tokens, a stripe each: small enough for a tiny model's requests to feel every one."""
CEILING = 128
CLOSE_CALL = 1e-4
"""The reference's two best tokens may change places if they are no further apart."""


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models")
    for name in ARCHITECTURES:
        make(MODELS[name], folder / name, seed=0)
    return folder


@pytest.fixture(scope="module")
def stage(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stage]:
    stage = Stage(tmp_path_factory.mktemp("d"), "sglang")
    yield stage
    stage.close()


@pytest.fixture
def worker(stage: Stage) -> Iterator[Hired]:
    stage.new_act()
    hired = stage.hire()
    yield hired
    hired.channel.close()
    assert hired.gone(), "a worker without an agent leaves"


def spec(checkpoints: Path, name: str, **fields: Any) -> ModelSpec:
    return model(name, str(checkpoints / name), kv_bytes_per_token=TOKEN_BYTES, **fields)


def lease(level: int) -> actions.FirstLease:
    return actions.FirstLease(page_bytes=PAGE_BYTES, revision=1, level=level, ceiling=CEILING)


class Restless:
    """A lease that goes to a random level every 50 ms, often in a hurry."""

    def __init__(self, worker: Hired, spec: ModelSpec, epoch: Epoch, *, levels: tuple[int, int], seed: int = 3) -> None:
        self.revision = 1
        self.level = 0
        self._worker, self._spec, self._epoch, self._levels = worker, spec, epoch, levels
        self._chance = random.Random(seed)
        self._due_s = 0.0

    def __call__(self, now: float) -> None:
        if now < self._due_s:
            return
        self._due_s = now + 0.05
        self.revision += 1
        level, self.level = self.level, self._chance.randint(*self._levels)
        if self.level >= level:
            self._worker.grant(self._spec, self._epoch, self.revision, self.level)
        else:
            within_s = self._chance.choice((0.0, 0.02, 0.2))
            self._worker.recall(self._spec, self._epoch, self.revision, self.level, within_s)


def assert_greedy(checkpoint: Path, answered: list[Wish]) -> None:
    """Every answer is the reference's, up to where a cancelled one ended; at most 1 % leave it at a close call."""
    close_calls = 0
    for wish, left in zip(answered, departures(checkpoint, [(w.prompt, w.tokens) for w in answered]), strict=True):
        assert not wish.failed, f"{wish.name}: {wish.failed}"
        assert wish.cancel_after is not None or len(wish.tokens) == wish.length, f"{wish.name} ends early"
        if left is not None:
            at, best, gap = left
            assert gap < CLOSE_CALL, f"{wish.name} says {wish.tokens[at]} at {at}, the reference {best} by {gap}"
            close_calls += 1
    assert close_calls <= len(answered) // 100


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_greedy_answers_are_transformers_while_the_lease_moves(
    stage: Stage, worker: Hired, checkpoints: Path, name: str, record_property: Callable[[str, object], None]
) -> None:
    tiny = spec(checkpoints, name)
    epoch, ready = worker.become(tiny, lease=lease(40))
    crowd = Crowd(stage, worker, tiny, epoch, ready.credits)
    restless = Restless(worker, tiny, epoch, levels=(0, 48))
    wanted = wishes(11, 200, cancelled=0.1)
    crowd.run(wanted, move_lease=restless)
    assert_greedy(checkpoints / name, wanted)
    record_property("limits", restless.revision)
    record_property("requeued", crowd.requeued)
    assert {answer.revision for answer in crowd.answers} <= set(range(1, restless.revision + 1))
    assert sum(w.cached > 0 for w in wanted) > 20, "prefixes are shared even while the lease moves"
