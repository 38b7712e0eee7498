"""Real SGLang over two ranks, which meet over gloo: the same tokens while the leases move, and nothing left of either."""

import asyncio
import json
import os
import random
import re
import select
import shutil
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import msgspec
import pytest
from chimera.core.model import ModelSpec
from chimera.core.placement import Seat
from chimera.core.replica import ReplicaId
from chimera.msg import actions, events, stream
from chimera.msg.events import Outcome
from chimera.tiny.maker import make
from chimera.tiny.shapes import MODELS
from chimera.units import MIB

from tests.agent.rig import alive, system
from tests.engine.crowd import Crowd, wishes
from tests.engine.pair import Pair, RestlessPair, hire_pair
from tests.engine.test_elastic import CEILING, PAGE_BYTES, TOKEN_BYTES, assert_greedy, lease, pool_bytes
from tests.worker.stage import PATIENCE_S, Hired, Stage, model, payload

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("default")]

LEASE_NEWS = (events.PagesReturned, events.PagesWanted, events.RequestFinished)
REQUESTS = int(os.environ.get("CHIMERA_TEST_GANG_REQUESTS", "40"))
"""200 takes minutes where two ranks and a client share two cores."""


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models")
    make(MODELS["llama"], folder / "llama", seed=0)
    return folder


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("images")


@pytest.fixture(scope="module")
def stage(tmp_path_factory: pytest.TempPathFactory, images: Path) -> Iterator[Stage]:
    stage = Stage(tmp_path_factory.mktemp("d"), "sglang", "--images", str(images), "--parked-models", "2")
    yield stage
    stage.close()


@pytest.fixture
def pair(stage: Stage) -> Iterator[Pair]:
    stage.new_act()
    hired = hire_pair(stage)
    yield hired
    hired.dismiss()


def spec(checkpoints: Path) -> ModelSpec:
    return model("llama", str(checkpoints / "llama"), kv_bytes_per_token=TOKEN_BYTES // 2, tp_size=2)


def test_llamas_greedy_answers_over_two_ranks_are_transformers_while_both_leases_move(
    stage: Stage, pair: Pair, checkpoints: Path, record_property: Callable[[str, object], None]
) -> None:
    tiny = spec(checkpoints)
    epoch, ready = pair.become(tiny, lease=lease(40))
    crowd = Crowd(stage, pair, tiny, epoch, ready.credits)
    restless = RestlessPair(pair, tiny, epoch, levels=(0, 48))
    wanted = wishes(11, REQUESTS, cancelled=0.1)
    crowd.run(wanted, move_lease=restless, patience_s=3.0 * REQUESTS)
    assert_greedy(checkpoints / "llama", wanted)
    record_property("limits", restless.revisions)
    record_property("requeued", crowd.requeued)
    assert {answer.gpu_id for answer in crowd.answers} == {0, 1}
    assert sum(w.cached > 0 for w in wanted) > REQUESTS // 10, "prefixes are shared even while the leases move"


def test_a_recall_is_answered_when_every_rank_has_come_down(stage: Stage, pair: Pair, checkpoints: Path) -> None:
    tiny = spec(checkpoints)
    epoch, ready = pair.become(tiny, lease=lease(CEILING))
    crowd = Crowd(stage, pair, tiny, epoch, ready.credits)
    crowd.run(wishes(5, 16))
    pids = (pair.pid, pair.second.pid)
    assert all(pool_bytes(pid) > 4 * PAGE_BYTES for pid in pids), "their prefixes are kept"
    pair.recall_at(1, tiny, epoch, 2, 4, within_s=0.2)
    level = CEILING
    while level > 4:
        answer = pair.inbox.next(events.PagesReturned, past=LEASE_NEWS)
        if (answer.gpu_id, answer.revision) == (1, 2):
            level = answer.level
    assert all(pool_bytes(pid) <= 4 * PAGE_BYTES for pid in pids)


def test_a_gang_leaves_and_its_workers_become_another_together(stage: Stage, pair: Pair, checkpoints: Path) -> None:
    tiny = spec(checkpoints)
    for turn in range(2):
        epoch, _ = pair.become(tiny, lease=lease(CEILING))
        name = f"r{turn}"
        pair.submit(name, epoch, payload([5] * 20, 8))
        (answer,) = stage.finished(name)
        assert len(answer.tokens) == 8
        for member in (pair, pair.second):
            member.leave("llama", epoch)
            member.inbox.next(events.ReplicaStopped, past=LEASE_NEWS)


def test_a_worker_with_a_parked_model_joins_a_gang_and_is_alone_again_afterwards(
    stage: Stage, pair: Pair, checkpoints: Path
) -> None:
    alone, both = model("alone", str(checkpoints / "llama"), kv_bytes_per_token=TOKEN_BYTES), spec(checkpoints)
    answers = []
    for name in ("before", "after"):
        epoch = Hired.activate(pair, alone, lease=lease(CEILING))
        pair.inbox.next(events.ReplicaReady)
        pair.submit(name, epoch, payload([5] * 20, 8))
        answers += stage.finished(name)
        pair.leave("alone", epoch)
        stopped = pair.inbox.next(events.ReplicaStopped, past=LEASE_NEWS)
        assert stopped.kept.models == ("alone",)
        epoch, _ = pair.become(both, lease=lease(CEILING))
        assert pair.inbox.next(events.PagesKept, past=LEASE_NEWS).kept.models == (), "a gang needs the process's own groups"
        pair.submit(f"both-{name}", epoch, payload([5] * 20, 8))
        answers += stage.finished(f"both-{name}")
        for member in (pair, pair.second):
            member.leave("llama", epoch)
            member.inbox.next(events.ReplicaStopped, past=LEASE_NEWS)
    assert [answer.tokens for answer in answers] == [answers[0].tokens] * 4


def test_heads_that_do_not_divide_are_refused_by_every_rank_and_nothing_is_left_half_built(
    pair: Pair, checkpoints: Path, tmp_path: Path
) -> None:
    odd = tmp_path / "odd"
    shutil.copytree(checkpoints / "llama", odd)
    config = json.loads((odd / "config.json").read_text())
    (odd / "config.json").write_text(json.dumps(config | {"num_attention_heads": 3, "num_key_value_heads": 3}))
    pair.activate(model("odd", str(odd), kv_bytes_per_token=TOKEN_BYTES // 2, tp_size=2), lease=lease(CEILING))
    for member in (pair, pair.second):
        failed = member.inbox.next(events.ActivationFailed)
        assert failed.permanent and "tp_size 2 does not divide" in failed.reason
    pair.become(spec(checkpoints), lease=lease(CEILING))


def test_an_answer_to_a_form_is_refused_by_name(stage: Stage, pair: Pair, checkpoints: Path) -> None:
    epoch, _ = pair.become(spec(checkpoints), lease=lease(CEILING))
    pair.submit("r", epoch, payload([5] * 20, 8, grammar=stream.Grammar("regex", "a+")))
    (answer,) = stage.finished("r")
    assert answer.failed is not None and "several GPUs" in answer.failed.message


def test_an_idle_gang_is_quiet(stage: Stage, pair: Pair, checkpoints: Path) -> None:
    epoch, _ = pair.become(spec(checkpoints), lease=lease(CEILING))
    pair.submit("r", epoch, payload([5] * 20, 8))
    stage.finished("r")
    pair.settles(1, CEILING)
    pids = (pair.pid, pair.second.pid)
    before, began_s = sum(map(wakes, pids)), time.monotonic()
    select.select([], [], [], 1.0)
    per_s = (sum(map(wakes, pids)) - before) / (time.monotonic() - began_s)
    assert per_s < 2 * 150, "gloo's one thread a rank looks a hundred times a second, and nothing else moves"


def wakes(pid: int) -> int:
    tasks = Path(f"/proc/{pid}/task").glob("*/status")
    return sum(int(re.findall(r"^voluntary_ctxt_switches:\s+(\d+)", task.read_text(), re.M)[0]) for task in tasks)


async def test_a_killed_rank_takes_the_gang_with_it_and_the_model_is_back(stage: Stage, checkpoints: Path) -> None:
    tiny = msgspec.structs.replace(spec(checkpoints), weight_bytes=MIB)
    seat = Seat(replica=ReplicaId("llama"), gpu_ids=(0, 1), kv_limit_bytes=16 * MIB)
    async with system(stage.folder / "parent.sock", [tiny], [seat], gpu_count=2, elastic=True) as (made, front):
        await made.until(events.ReplicaReady)
        broken = front.ask("broken", of="llama", prompt=[5] * 20, tokens=2000)
        await asyncio.wait_for(broken.began.wait(), PATIENCE_S)
        before = made.workers()
        killed_s = time.monotonic()
        os.kill(before[1], signal.SIGKILL)
        await asyncio.wait_for(broken.ended.wait(), PATIENCE_S)
        assert isinstance(broken.verdict, actions.Requeue) and broken.verdict.lost
        await made.until(events.ReplicaReady)
        assert time.monotonic() - killed_s < 10.0
        assert not any(alive(pid) for pid in before)
        again = front.ask("again", of="llama", prompt=[5] * 20, tokens=8)
        await asyncio.wait_for(again.ended.wait(), PATIENCE_S)
        assert again.outcome is Outcome.LENGTH


# Weights from images, one for each rank.


def test_a_gang_that_comes_back_takes_its_weights_from_images_and_says_the_same(
    stage: Stage, pair: Pair, checkpoints: Path, images: Path
) -> None:
    make(MODELS["llama"], checkpoints / "imaged", seed=5)
    tiny = model("imaged", str(checkpoints / "imaged"), kv_bytes_per_token=TOKEN_BYTES // 2, tp_size=2)
    answers, known = [], set(images.glob("*.image"))
    for turn in range(2):
        epoch, _ = pair.become(tiny, lease=lease(CEILING))
        pair.submit(f"r{turn}", epoch, payload([5] * 20, 32))
        answers += stage.finished(f"r{turn}")
        for member in (pair, pair.second):
            member.leave("imaged", epoch)
            member.inbox.next(events.ReplicaStopped, past=LEASE_NEWS)
        made = set(images.glob("*.image")) - known
        assert len(made) == 2, "one for each rank, made once"
    first, again = answers
    assert first.tokens == again.tokens
    whole = sum(file.stat().st_size for file in (checkpoints / "imaged").glob("*.safetensors"))
    assert all(image.stat().st_size < 0.7 * whole for image in made), "a rank has its part of the weights"


def test_a_gang_that_wakes_up_wrong_does_not_serve(stage: Stage, pair: Pair, checkpoints: Path, images: Path) -> None:
    make(MODELS["llama"], checkpoints / "spoilt", seed=6)
    tiny = model("spoilt", str(checkpoints / "spoilt"), kv_bytes_per_token=TOKEN_BYTES // 2, tp_size=2)
    known = set(images.glob("*.image"))
    epoch, _ = pair.become(tiny, lease=lease(CEILING))
    for member in (pair, pair.second):
        member.leave("spoilt", epoch)
        member.inbox.next(events.ReplicaStopped, past=LEASE_NEWS)
    for image in set(images.glob("*.image")) - known:
        with image.open("r+b") as file:
            file.write(random.Random(1).randbytes(image.stat().st_size // 2))
    pair.activate(tiny, lease=lease(CEILING))
    failed = pair.inbox.next(events.ActivationFailed)
    assert "woke up wrong" in failed.reason and not failed.permanent


def test_a_truncated_checkpoint_is_refused_by_every_rank(pair: Pair, checkpoints: Path) -> None:
    make(MODELS["llama"], checkpoints / "short", seed=7)
    (file,) = (checkpoints / "short").glob("*.safetensors")
    os.truncate(file, file.stat().st_size - 1000)
    pair.activate(model("short", str(checkpoints / "short"), kv_bytes_per_token=TOKEN_BYTES // 2, tp_size=2))
    for member in (pair, pair.second):
        failed = member.inbox.next(events.ActivationFailed)
        assert failed.permanent and file.name in failed.reason
