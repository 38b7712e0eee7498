"""Asks a GPU the questions that settle the design, each in a process of its own, and writes what it answers into one JSON.

A question that fails, hangs or is killed costs its own answer and nothing else; what it had found out until then is kept.

    python benchmark/gpu/spike.py --only 2,3,4,5,7 --budget-s 540 --json FILE    # no SGLang needed, except for 7
    python benchmark/gpu/spike.py --only 1,6,8 --budget-s 540 --json FILE        # what serves through SGLang
    python benchmark/gpu/spike.py --rehearse                                     # every line that runs without a GPU
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import importlib
import importlib.metadata
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

# Run as a script, perhaps where the package is not installed.
sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "python"))
sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from benchmark.gpu.answer import Answer, read
from benchmark.gpu.questions import QUESTIONS, Question
from benchmark.gpu.standins import surroundings
from benchmark.report import Figures, parser

ROOT = Path(__file__).resolve().parents[2]
PACKAGES = ("torch", "triton", "transformers", "sglang", "sglang-kernel", "apache-tvm-ffi", "cuda-bindings", "nvidia-ml-py")
LEAST_S = 5.0
"""A question that has less time than this is not asked."""
LOG_LINES = 40


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    number: int
    title: str
    state: str
    """`ok`, `failed`, `cut` at its bound, or `skipped`."""
    reason: str = ""
    wall_s: float = 0.0
    decides: str = ""
    figures: list[dict[str, Any]] = dataclasses.field(default_factory=list)
    facts: dict[str, str] = dataclasses.field(default_factory=dict)
    log: list[str] = dataclasses.field(default_factory=list)
    """The end of what the question printed, kept when it did not end well."""


def ask(question: Question, *, limit_s: float, rehearse: bool, seed: int) -> Outcome:
    """Puts one question to a process of its own, and takes that process, and all it started, down at `limit_s`."""
    with tempfile.TemporaryDirectory(prefix="spike-") as folder:
        answer, log, support = Path(folder, "answer.jsonl"), Path(folder, "log"), Path(folder, "support")
        command = [sys.executable, __file__, "--answer", question.module, "--into", str(answer), "--seed", str(seed)]
        begin = time.monotonic()
        with log.open("w") as printed:
            process = subprocess.Popen(
                [*command, "--rehearse"] if rehearse else command,
                stdout=printed,
                stderr=subprocess.STDOUT,
                stdin=subprocess.DEVNULL,
                start_new_session=True,
                env={**os.environ, "TMPDIR": folder, **surroundings(support, rehearse=rehearse), **_paths(support)},
            )
            try:
                status: int | None = process.wait(limit_s)
            except subprocess.TimeoutExpired:
                status = None
            finally:
                _end_session(process)
        wall_s = time.monotonic() - begin
        figures, facts = read(answer)
        lines = log.read_text(errors="replace").splitlines()[-LOG_LINES:]
    match status:
        case 0:
            state, reason = "ok", ""
        case None:
            state, reason = "cut", f"not done after {limit_s:.0f} s"
        case _ if status < 0:
            state, reason = "failed", f"killed by {signal.Signals(-status).name}"
        case _:
            state, reason = "failed", lines[-1] if lines else f"exit {status}"
    return Outcome(
        number=question.number,
        title=question.title,
        state=state,
        reason=reason,
        wall_s=round(wall_s, 2),
        figures=figures,
        facts=facts,
        log=[] if state == "ok" else lines,
    )


def _paths(support: Path) -> dict[str, str]:
    """What processes further down need to import us, and to find the tools beside this interpreter (ninja, for one)."""
    folders = (str(support), str(ROOT), str(ROOT / "python"), os.environ.get("PYTHONPATH"))
    return {
        "PYTHONPATH": os.pathsep.join(filter(None, folders)),
        "PATH": os.pathsep.join((str(Path(sys.executable).parent), os.environ.get("PATH", os.defpath))),
    }


def _end_session(process: subprocess.Popen[bytes]) -> None:
    """Kills whatever is left of the session that a question opened: engines outlive a leader that died."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def ask_all(
    questions: Sequence[Question], *, figures: Figures, budget_s: float, rehearse: bool, seed: int, into: Path | None
) -> list[Outcome]:
    """One question after the other, within the budget. The JSON is whole after each, should the next be the last."""
    deadline = time.monotonic() + budget_s
    outcomes: list[Outcome] = []
    for question in questions:
        left_s = deadline - time.monotonic()
        print(f"\n## {question.number}. {question.title}", flush=True)
        if left_s < LEAST_S:
            reason = f"no time left of {budget_s:.0f} s"
            outcome = Outcome(number=question.number, title=question.title, state="skipped", reason=reason)
        else:
            outcome = ask(question, limit_s=min(question.limit_s, left_s), rehearse=rehearse, seed=seed)
        outcomes.append(dataclasses.replace(outcome, decides=question.decides))
        for figure in outcome.figures:
            figures.add(figure["name"], figure["value"], figure["unit"], spread=_pair(figure["spread"]))
        for name, told in outcome.facts.items():
            print(f"{name}: {told}")
        print(
            " ".join(filter(None, (f"question {question.number}: {outcome.state},", f"{outcome.wall_s:.1f} s", outcome.reason)))
        )
        for line in outcome.log:
            print(f"  | {line}")
        if into is not None:
            write(into, figures, outcomes, rehearse=rehearse)
    return outcomes


def _pair(spread: Sequence[float] | None) -> tuple[float, float] | None:
    return None if spread is None else (spread[0], spread[1])


def write(into: Path, figures: Figures, outcomes: Sequence[Outcome], *, rehearse: bool) -> None:
    told = {
        "title": figures.title,
        **figures.circumstances,
        "rehearsed": rehearse,
        "questions": [dataclasses.asdict(outcome) for outcome in outcomes],
    }
    into.parent.mkdir(parents=True, exist_ok=True)
    into.write_text(json.dumps(told, indent=2, ensure_ascii=False) + "\n")


def circumstances(*, rehearse: bool) -> dict[str, str]:
    """The GPU, its driver and the versions that matter."""
    versions = {}
    for package in PACKAGES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions[package] = importlib.metadata.version(package)
    return {"gpu": "none: rehearsed on the CPU" if rehearse else _gpu(), **versions}


def _gpu() -> str:
    """The first GPU as NVML describes it. Asks no CUDA: the context would be on the books of every question."""
    import pynvml

    pynvml.nvmlInit()
    try:
        handle = pynvml.nvmlDeviceGetHandleByIndex(0)
        memory = pynvml.nvmlDeviceGetMemoryInfo(handle)
        name, cuda = pynvml.nvmlDeviceGetName(handle), pynvml.nvmlSystemGetCudaDriverVersion()
        driver = pynvml.nvmlSystemGetDriverVersion()
    finally:
        pynvml.nvmlShutdown()
    used, total = memory.used >> 20, memory.total >> 20
    return f"{name}, {total} MiB ({used} MiB used before), driver {driver}, CUDA {cuda // 1000}.{cuda % 1000 // 10}"


def answer_one(module: str, into: Path, *, rehearse: bool, seed: int) -> int:
    """What the process of one question does."""
    # Should a question ask for more than the machine has, it is the one to be killed.
    with contextlib.suppress(OSError):
        Path("/proc/self/oom_score_adj").write_text("1000")
    random.seed(seed)
    answer = Answer(into)
    try:
        importlib.import_module(module).answer(answer, rehearse=rehearse)
    except Exception as error:  # noqa: BLE001 - the outermost loop of a process: reports and exits
        answer.fact("traceback", traceback.format_exc())
        print(f"{type(error).__name__}: {error}".splitlines()[0], file=sys.stderr)
        return 1
    return 0


def _numbers(text: str) -> list[Question]:
    known = {question.number: question for question in QUESTIONS}
    try:
        return [known[int(number)] for number in text.split(",")]
    except (KeyError, ValueError) as error:
        raise argparse.ArgumentTypeError(f"there are questions {', '.join(map(str, known))}") from error


def main() -> int:
    options = parser(__doc__)
    options.add_argument(
        "--only", metavar="1,3,5", type=_numbers, default=list(QUESTIONS), help="these questions, in this order"
    )
    options.add_argument("--budget-s", metavar="N", type=float, default=1200, help="for all of them together (default: 1200)")
    options.add_argument(
        "--rehearse", action="store_true", help="tiny shapes on the CPU: shows that the script works, measures nothing"
    )
    options.add_argument("--commit", help="where this tree travelled without its history")
    options.add_argument("--answer", metavar="MODULE", help=argparse.SUPPRESS)
    options.add_argument("--into", metavar="FILE", type=Path, help=argparse.SUPPRESS)
    arguments = options.parse_args()
    if arguments.answer:
        return answer_one(arguments.answer, arguments.into, rehearse=arguments.rehearse, seed=arguments.seed)
    try:
        facts = circumstances(rehearse=arguments.rehearse)
    except Exception as error:  # noqa: BLE001 - NVML missing, its library missing, no device: one refusal for all
        print(f"no NVIDIA GPU here ({error}); --rehearse runs what a CPU can", file=sys.stderr)
        return 2
    if arguments.commit:
        facts["commit"] = arguments.commit
    outcomes = ask_all(
        arguments.only,
        figures=Figures("the GPU spike", seed=arguments.seed, facts=facts),
        budget_s=arguments.budget_s,
        rehearse=arguments.rehearse,
        seed=arguments.seed,
        into=arguments.json,
    )
    print()
    for outcome in outcomes:
        print(f"{outcome.number}. {outcome.state:8}{outcome.wall_s:6.1f} s  {outcome.title}")
    return int(any(outcome.state not in ("ok", "skipped") for outcome in outcomes))


if __name__ == "__main__":
    raise SystemExit(main())
