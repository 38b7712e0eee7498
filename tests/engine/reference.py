"""What transformers thinks of an answer: the truth that engines are held against."""

import gc
from collections.abc import Iterator
from pathlib import Path


def departures(checkpoint: Path, answers: list[tuple[list[int], list[int]]]) -> Iterator[tuple[int, int, float] | None]:
    """For each (prompt, answer): where it first leaves the greedy path, what was best there, and by how much. None if never.

    Each token is judged after the answer's own earlier ones. While they are the greedy ones that is the greedy path itself,
    so an answer without departure is the greedy answer; and it takes one pass instead of one for each token.
    """
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32).eval()
    with torch.inference_mode():
        for prompt, answer in answers:
            if not answer:
                yield None
                continue
            logits = model(input_ids=torch.tensor([prompt + answer[:-1]])).logits[0, len(prompt) - 1 :]
            best, second = logits.topk(2, dim=1)
            at = next((i for i, token in enumerate(answer) if token != int(second[i, 0])), None)
            yield None if at is None else (at, int(second[at, 0]), float(best[at, 0] - best[at, 1]))
    del model
    gc.collect()
