"""`make serve` from end to end: SGLang with the three small models, and a question to each."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Iterator

import pytest

from examples.tiny_models.lessons import LESSONS, Lesson
from tests.docs.documents import ROOT, shell_lines
from tests.serve.house import House, house, until

pytestmark = pytest.mark.slow

FILE = ROOT / "model_configs" / "cpu_1_gpu_3_model.json"
START_S = 180.0


def asked(served: House, model: str, request: str) -> str:
    body = {"model": model, "messages": [{"role": "user", "content": request}], "temperature": 0, "max_tokens": 160}
    status, told = served.ask("POST", "/v1/chat/completions", body)
    assert status == 200, told
    [choice] = told["choices"]
    assert choice["finish_reason"] == "stop"
    answer: str = choice["message"]["content"]
    return answer


@pytest.fixture(scope="module")
def served() -> Iterator[House]:
    with house(FILE, "--engine", "sglang", ready=False) as opened:
        until(lambda: opened.address[1], "the server to be ready", START_S)
        yield opened


@pytest.mark.parametrize("lesson", LESSONS.values(), ids=LESSONS)
def test_a_model_answers_what_it_learnt(served: House, lesson: Lesson) -> None:
    cases = list(lesson.held_out(8))
    right = [lesson.right(case.request, case.answer, asked(served, lesson.name, case.request)) for case in cases]
    assert sum(right) >= 7


FIRST_CHAT = (ROOT / "README.md").read_text().partition("## A first chat")[2].partition("\n## ")[0]


@pytest.mark.parametrize("command", list(shell_lines(FIRST_CHAT)), ids=lambda words: " ".join(words[:3]))
def test_the_first_chat_of_the_readme_runs_as_it_is_written(served: House, command: list[str]) -> None:
    url = "http://{}:{}".format(*served.address)
    if command[0] == ".venv/bin/chimera":
        words = [sys.executable, "-m", "chimera", *command[1:], "--url", url]
    else:
        words = [word.replace("http://127.0.0.1:8000", url) for word in command]
    told = subprocess.run(words, capture_output=True, text=True, timeout=60.0)
    assert told.returncode == 0, told.stderr
    if "What is 17 + 25?" in command:
        [shown] = re.findall(r"```text\n(.*?)```", FIRST_CHAT, re.DOTALL)
        assert told.stdout.strip() == shown.strip()
    assert told.stdout.strip()
