"""Real SGLang in a real worker: its tokens are the model's, and one process becomes one model after another."""

import gc
from collections.abc import Iterator
from pathlib import Path

import pytest
from chimera.msg import actions, events
from chimera.msg.events import Outcome
from chimera.tiny.maker import make
from chimera.tiny.shapes import MODELS

from tests.worker.stage import Hired, Stage, model, payload

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("default")]

ARCHITECTURES = ("llama", "qwen3", "gemma2", "mistral", "moe")
PROMPTS = [[3 + (7 * i + 11 * j) % 500 for j in range(length)] for i, length in enumerate((1, 5, 17, 64))]
LENGTH = 24
KV = 8192 * 4096


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
    hired.dismiss()


def reference_answers(checkpoint: Path) -> list[list[int]]:
    """What transformers says, greedily."""
    import torch
    from transformers import AutoModelForCausalLM

    reference = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32).eval()
    reference.generation_config.eos_token_id = None  # the engine is told to ignore it as well
    answers = []
    for prompt in PROMPTS:
        ids = torch.tensor([prompt])
        out = reference.generate(
            ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=LENGTH, pad_token_id=0
        )
        answers.append(out[0, len(prompt) :].tolist())
    del reference
    gc.collect()
    return answers


def test_every_architecture_in_one_process_says_what_transformers_says(stage: Stage, worker: Hired, checkpoints: Path) -> None:
    for name in (*ARCHITECTURES, ARCHITECTURES[0]):
        epoch, _ = worker.become(model(name, str(checkpoints / name)), kv_limit_bytes=KV)
        stage.answers.clear()
        ids = [f"{name}-{i}" for i in range(len(PROMPTS))]
        for request_id, prompt in zip(ids, PROMPTS, strict=True):
            worker.submit(request_id, epoch, payload(prompt, LENGTH))
        answers = stage.finished(*ids)
        assert [a.tokens for a in answers] == reference_answers(checkpoints / name), name
        for _ in ids:
            assert worker.inbox.next(events.RequestFinished).outcome is Outcome.LENGTH
        worker.leave(name, epoch)
        worker.inbox.next(events.ReplicaStopped)


def test_an_aborted_request_leaves_room_for_the_next(stage: Stage, worker: Hired, checkpoints: Path) -> None:
    epoch, ready = worker.become(model("llama", str(checkpoints / "llama")), kv_limit_bytes=KV)
    for i in range(ready.credits):
        worker.submit(f"long-{i}", epoch, payload([5, 6, 7 + i], 450))
    stage.read_front(lambda: len(stage.answers) == ready.credits)
    for i in range(ready.credits):
        worker.channel.send(actions.Abort(request_id=f"long-{i}", replica=ready.replica, epoch=epoch, reason="gone"))
        assert worker.inbox.next(events.RequestFinished).outcome is Outcome.CANCELLED
    worker.submit("short", epoch, payload([5, 6, 7], 4))
    assert len(stage.finished("short")[0].tokens) == 4


def test_a_stop_token_ends_the_answer(stage: Stage, worker: Hired, checkpoints: Path) -> None:
    epoch, _ = worker.become(model("llama", str(checkpoints / "llama")), kv_limit_bytes=KV)
    worker.submit("free", epoch, payload(PROMPTS[1], 8))
    (free,) = stage.finished("free")
    stop = free.tokens[3]
    worker.submit("stopped", epoch, payload(PROMPTS[1], 8, stop_token_ids=(stop,), ignore_eos=False))
    (stopped,) = stage.finished("stopped")
    assert stopped.outcome is Outcome.STOP
    assert stopped.tokens == free.tokens[: free.tokens.index(stop) + 1]


def test_a_folder_that_is_no_model_fails_with_a_reason_and_the_worker_stays_usable(
    worker: Hired, checkpoints: Path, tmp_path: Path
) -> None:
    (tmp_path / "config.json").write_text('{"architectures": ["NoSuchModel"], "model_type": "no_such"}')
    worker.activate(model("broken", str(tmp_path)))
    failed = worker.inbox.next(events.ActivationFailed)
    assert failed.permanent and failed.reason
    worker.become(model("llama", str(checkpoints / "llama")), kv_limit_bytes=KV)
