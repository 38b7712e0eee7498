"""The launches of Prism's README, word for word, each with a server behind it that answers."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from chimera.tiny.maker import make
from chimera.tiny.shapes import MODELS

from tests.serve.house import House, launched, placement, until

FULL = (
    "--enable-elastic-memory --use-kvcached-v0 --enable-gpu-scheduler --enable-controller --policy simple-global "
    "--enable-model-service --enable-worker-pool --workers-per-gpu 4 --num-model-service-workers 4 --num-gpus 8 "
    "--enable-cpu-share-memory --max-mem-usage 67.28"
)


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two models on the first two GPUs."""
    folder = tmp_path_factory.mktemp("launch")
    make(MODELS["llama"], folder / "llama", 0)
    return placement(folder, folder / "llama", {"a": {"step_s": 0.001}, "b": {"step_s": 0.001}}, gpus=2)


def answers(served: House) -> None:
    for model in ("a", "b"):
        status, answer = served.complete(model, tokens=5)
        assert status == 200, answer
        assert answer["model"] == model
        assert answer["usage"]["completion_tokens"] == 5


def test_the_full_launch_serves_and_says_once_what_has_gone(file: Path) -> None:
    with launched(file, *FULL.split()) as served:
        answers(served)
        idle = sorted(told[1] for line in served.said if (told := re.search(r"(--\S+) has no effect", line)))
        gone = ["--enable-controller", "--enable-gpu-scheduler", "--max-mem-usage", "--use-kvcached-v0"]
        not_simulated = ["--enable-model-service", "--num-model-service-workers"]
        assert idle == sorted([*gone, *not_simulated])
        status, told = served.ask("GET", "/policy")
        assert (status, told["policy"]) == (200, "simple-global")
        assert until(lambda: len(served.workers()) >= 32, "four EMPTY workers for each GPU")
        assert len(served.ask("GET", "/snapshot")[1]["gpus"]) == 8


@pytest.mark.slow
@pytest.mark.parametrize(
    "flags",
    [
        "",
        "--enable-elastic-memory --use-emm-v0",
        "--enable-elastic-memory --use-kvcached-v0",
        FULL.replace("--use-kvcached-v0", "--use-emm-v0"),
    ],
    ids=["static", "elastic", "kvcached", "full"],
)
def test_a_launch_serves(file: Path, flags: str) -> None:
    with launched(file, *flags.split()) as served:
        answers(served)
        sizes = served.ask("GET", "/get_memory_pool_size")[1]
        assert {size["model_name"] for size in sizes} == {"a", "b"}
