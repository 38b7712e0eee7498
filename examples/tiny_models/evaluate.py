"""Asks the three small models what they were never trained on, and says how often they are right.

    python examples/tiny_models/evaluate.py [NAME...] [--cases 500]

Loads the folders with Hugging Face's transformers, as anybody would, in float32. Exits 1 when one misses its goal.
"""

from __future__ import annotations

import argparse
import sys
import time
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))  # run as a script: the repository is not a package

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from examples.tiny_models.lessons import LESSONS, Lesson

HERE = Path(__file__).parent
_AT_ONCE = 128
_LONGEST = 160
_SHOWN = 3


@dataclass(frozen=True, slots=True)
class Score:
    asked: int
    right: int
    shown: tuple[tuple[str, str], ...]
    wrong: tuple[tuple[str, str], ...]
    """Request and answer."""

    @property
    def share(self) -> float:
        return self.right / self.asked


def evaluate(lesson: Lesson, folder: Path, cases: int = 500) -> Score:
    examples = list(lesson.held_out(cases))
    answers = answer(folder, [e.request for e in examples], lesson.temperature)
    told = [(e.request, given) for e, given in zip(examples, answers, strict=True)]
    wrong = tuple(
        (e.request, given) for e, given in zip(examples, answers, strict=True) if not lesson.right(e.request, e.answer, given)
    )
    return Score(asked=cases, right=cases - len(wrong), shown=tuple(told[:_SHOWN]), wrong=wrong)


def answer(folder: Path, requests: list[str], temperature: float = 0.0) -> list[str]:
    tokenizer = AutoTokenizer.from_pretrained(folder, padding_side="left")
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    sampling = {"do_sample": True, "temperature": temperature, "top_k": 0} if temperature else {"do_sample": False}
    torch.manual_seed(0)
    answers: list[str] = []
    for begin in range(0, len(requests), _AT_ONCE):
        chats = [[{"role": "user", "content": request}] for request in requests[begin : begin + _AT_ONCE]]
        prompts = tokenizer.apply_chat_template(
            chats, add_generation_prompt=True, return_tensors="pt", padding=True, return_dict=True
        )
        made = model.generate(**prompts, **sampling, max_new_tokens=_LONGEST)
        answers += tokenizer.batch_decode(made[:, prompts["input_ids"].shape[1] :], skip_special_tokens=True)
    return answers


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("names", nargs="*", metavar="NAME", help="default: all three")
    parser.add_argument("--cases", type=int, default=500, help="of each (default: %(default)s)")
    parser.add_argument("--models", type=Path, default=HERE, help="where their folders are")
    parser.add_argument("--wrong", action="store_true", help="show each answer that is not right")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    status = 0
    for name in arguments.names or LESSONS:
        lesson, began = LESSONS[name], time.monotonic()
        score = evaluate(lesson, arguments.models / name, arguments.cases)
        verdict = "" if score.share >= lesson.goal else ", below its goal"
        print(
            f"{name}: {score.right} of {score.asked} right ({score.share:.1%}; goal {lesson.goal:.0%}), "
            f"{lesson.sampling}, {time.monotonic() - began:.0f} s{verdict}"
        )
        for request, given in score.wrong if arguments.wrong else ():
            print(f"  {request!r} -> {given!r}")
        status |= score.share < lesson.goal
    return status


if __name__ == "__main__":
    sys.exit(main())
