"""Trains one of the small models and writes it, in the layout of a Hugging Face checkpoint, beside this file.

    python examples/tiny_models/train.py sums|stories|shell [--out DIR] [--steps N]

One thread and fixed seeds: the same machine, or one of its kind, writes the same bytes. bfloat16 arithmetic, which is what
makes it a matter of minutes on a CPU that has instructions for it (AMX, or AVX-512 with BF16), and the weights are kept so.
"""

from __future__ import annotations

import argparse
import math
import random
import sys
import time
from collections.abc import Iterator
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))  # run as a script: the repository is not a package

import torch
from tokenizers import Tokenizer
from torch import Tensor
from torch.nn.utils import clip_grad_norm_

from examples.tiny_models.checkpoint import config_of, write
from examples.tiny_models.decoder import Decoder
from examples.tiny_models.evaluate import Score, evaluate
from examples.tiny_models.lessons import LESSONS, Lesson

_PEAK_RATE, _WARM_UP = 2e-3, 100
_BALANCE = 0.01
_REPORT_EVERY = 100
_SORTED_TOGETHER = 8


def train(lesson: Lesson, tokenizer: Tokenizer, steps: int) -> tuple[Decoder, float]:
    """The model, and the mean loss of its last hundred steps."""
    torch.manual_seed(0)
    model = Decoder(config_of(lesson, tokenizer))
    matrices, others = _apart(model)
    groups = [{"params": matrices, "weight_decay": 0.1}, {"params": others, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=_PEAK_RATE, betas=(0.9, 0.98))
    batches, losses, began = _batches(lesson, tokenizer), [], time.monotonic()
    for step in range(1, steps + 1):
        for group in optimizer.param_groups:
            group["lr"] = _PEAK_RATE * min(step / _WARM_UP, 0.5 * (1 + math.cos(math.pi * step / steps)))
        ids, answered = next(batches)
        with torch.autocast("cpu", torch.bfloat16):
            loss = model.loss(ids, answered)
        optimizer.zero_grad()
        (loss + _BALANCE * model.imbalance()).backward()
        clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        losses.append(loss.item())
        if step % _REPORT_EVERY == 0:
            mean = sum(losses[-_REPORT_EVERY:]) / _REPORT_EVERY
            print(f"step {step} of {steps}: loss {mean:.4f}, {time.monotonic() - began:.0f} s", flush=True)
    newest = losses[-_REPORT_EVERY:]
    return model, sum(newest) / len(newest)


def _apart(model: Decoder) -> tuple[list[torch.nn.Parameter], list[torch.nn.Parameter]]:
    matrices = [p for p in model.parameters() if p.dim() > 1]
    return matrices, [p for p in model.parameters() if p.dim() == 1]


def _batches(lesson: Lesson, tokenizer: Tokenizer) -> Iterator[tuple[Tensor, Tensor]]:
    """Token numbers, and which of them are the answer's. A few batches are sorted by length together: less padding."""
    dice = random.Random(f"{lesson.name}, training")
    while True:
        examples = [lesson.example(dice) for _ in range(lesson.batch * _SORTED_TOGETHER)]
        prompts = tokenizer.encode_batch([lesson.prompt(e.request) for e in examples], add_special_tokens=False)
        answers = tokenizer.encode_batch([e.answer + lesson.special[1] for e in examples], add_special_tokens=False)
        rows = sorted(((p.ids, a.ids) for p, a in zip(prompts, answers, strict=True)), key=lambda row: len(row[0] + row[1]))
        batches = [rows[i : i + lesson.batch] for i in range(0, len(rows), lesson.batch)]
        dice.shuffle(batches)
        for batch in batches:
            yield _padded(batch, lesson.special.index("<pad>"))


def _padded(rows: list[tuple[list[int], list[int]]], padding: int) -> tuple[Tensor, Tensor]:
    longest = max(len(prompt) + len(answer) for prompt, answer in rows)
    ids = torch.full((len(rows), longest), padding)
    answered = torch.zeros((len(rows), longest), dtype=torch.bool)
    for row, (prompt, answer) in enumerate(rows):
        ids[row, : len(prompt) + len(answer)] = torch.tensor(prompt + answer)
        answered[row, len(prompt) : len(prompt) + len(answer)] = True
    return ids, answered


def card(lesson: Lesson, model: Decoder, steps: int, loss: float, score: Score) -> str:
    parameters = sum(p.numel() for p in model.parameters())
    lines = [
        f"# {lesson.name}: {lesson.purpose}",
        "",
        "| | |",
        "|---|---|",
        f"| parameters | {parameters:,}, kept in bfloat16 |",
        f"| vocabulary | {model.lm_head.out_features} byte pairs, of the lesson's own text |",
        f"| data | made up as it trains, by `examples/tiny_models/lessons/{lesson.name}.py`; nobody's text |",
        f"| training | {steps:,} steps of {lesson.batch} examples, seed 0, one thread |",
        f"| loss | {loss:.4f} over the last {_REPORT_EVERY} steps |",
        f"| held out | {score.right} of {score.asked} right ({score.share:.1%}), {lesson.sampling} |",
        "",
        f"What is right, and what was held out, says the lesson. Made by `python examples/tiny_models/train.py {lesson.name}`.",
        "",
    ]
    return "\n".join([*lines, *(f"- {request}\n  `{answer}`" for request, answer in score.shown), ""])


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("lesson", choices=sorted(LESSONS))
    parser.add_argument("--out", type=Path, default=Path(__file__).parent, help="the directory that the model's folder goes to")
    parser.add_argument("--steps", type=int, help="instead of the lesson's own number")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)
    lesson = LESSONS[arguments.lesson]
    tokenizer, steps = lesson.tokenizer(), arguments.steps or lesson.steps
    model, loss = train(lesson, tokenizer, steps)
    folder = arguments.out / lesson.name
    write(lesson, tokenizer, model.state_dict(), folder)
    score = evaluate(lesson, folder)
    (folder / "README.md").write_text(card(lesson, model, steps, loss, score))
    print(f"{folder}: loss {loss:.4f}, {score.right} of {score.asked} right")


if __name__ == "__main__":
    main()
