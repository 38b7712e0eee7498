"""Fits a cost table to a running server: what a step, a prompt and a request cost on this machine.

    chimera serve model_configs/cpu_1_gpu_2_model.json --port 8123
    python -m benchmark.sim.fit --url http://127.0.0.1:8123 --base cpu-2-cores --out table.json

Asks one model, alone: prompts of several lengths, and answers of several at a time; takes the least of each, for what a busy
machine adds is not its price. A parabola and a line give the coefficients; what they cannot tell apart (memory bandwidth,
links, neighbours) stays as the base table has it, and is said to.
"""

from __future__ import annotations

import argparse
import http.client
import json
import random
import statistics
import threading
from collections.abc import Mapping
from pathlib import Path
from time import perf_counter
from typing import Any
from urllib.parse import urlsplit

import numpy
from chimera.config.cost_tables import read_cost_table

PROMPTS = (16, 128, 256, 512, 768)
AT_ONCE = (1, 2, 4, 8)
ANSWER_TOKENS = 48
REPEATS = 9


def main() -> int:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--url", required=True)
    options.add_argument("--model", help="default: the first that the server names")
    options.add_argument("--base", default="cpu-2-cores")
    options.add_argument("--out", type=Path, required=True)
    arguments = options.parse_args()
    snapshot = json.loads(_get(arguments.url, "/snapshot"))
    model = next(m for m in snapshot["models"] if arguments.model in (None, m["name"]))
    table = fitted(model, json.loads(read_cost_table(arguments.base)), *measured(arguments.url, model["name"]))
    arguments.out.write_text(json.dumps(table, indent=2) + "\n")
    return 0


Points = list[tuple[int, float]]


def fitted(model: Mapping[str, Any], table: dict[str, Any], ttft: Points, tpot: Points) -> dict[str, Any]:
    """The table with what one model tells, as a server's snapshot describes it: TTFT by prompt tokens, TPOT by sequences."""
    name, weight_bytes = model["name"], model["weight_bytes"]
    half_pair_s, token_s, first_s = _rising(ttft)
    sequence_s, step_s = (float(c) for c in numpy.polyfit(*zip(*tpot, strict=True), deg=1))
    base_s = max(1e-5, step_s - weight_bytes / table["weight_bytes_per_s"])
    found = {
        "step_s": base_s,
        "step_sequence_s": max(0.0, sequence_s),
        "request_s": max(0.0, first_s - base_s),
        "prefill_weight_bytes_per_s": weight_bytes / max(1e-9, token_s),
        "prefill_kv_bytes_per_s": model["kv_bytes_per_token"] / max(1e-12, 2 * half_pair_s),
    }
    told = table | {key: float(f"{value:.4g}") for key, value in found.items()}
    source = f"measured by benchmark/sim/fit.py on {name} alone ({weight_bytes} weight bytes)"
    return told | {"sources": table["sources"] | dict.fromkeys(found, source)}


def _rising(points: Points) -> tuple[float, float, float]:
    """The parabola, if a longer prompt costs more per token, and else the line: a slope belongs to its own curvature only."""
    lengths, seconds = zip(*points, strict=True)
    half_pair_s, token_s, first_s = (float(c) for c in numpy.polyfit(lengths, seconds, deg=2))
    if half_pair_s > 0 and token_s > 0:
        return half_pair_s, token_s, first_s
    token_s, first_s = (float(c) for c in numpy.polyfit(lengths, seconds, deg=1))
    return 0.0, token_s, first_s


def measured(url: str, name: str) -> tuple[Points, Points]:
    """TTFT by prompt tokens and TPOT by sequences, of one model alone."""
    draw = random.Random(1)
    for length in PROMPTS:
        _ask(url, name, _prompt(draw, length), 2)
    ttft = [(length, min(_ask(url, name, _prompt(draw, length), 2)[0] for _ in range(REPEATS))) for length in PROMPTS]
    tpot = paces(url, name, draw)
    for what, points in (("TTFT by prompt tokens", ttft), ("TPOT by sequences", tpot)):
        print(f"# {name}: {what}:", ", ".join(f"{x}: {1e3 * y:.2f} ms" for x, y in points))
    return ttft, tpot


def paces(url: str, name: str, draw: random.Random) -> Points:
    return [(count, min(_together(url, name, draw, count) for _ in range(5))) for count in AT_ONCE]


def _prompt(draw: random.Random, length: int) -> list[int]:
    return [draw.randrange(100, 200) for _ in range(length)]


def _together(url: str, model: str, draw: random.Random, count: int) -> float:
    """TPOT while so many answers are made at once."""
    found: list[float] = []
    prompts = [_prompt(draw, 16) for _ in range(count)]
    threads = [
        threading.Thread(target=lambda p=prompt: found.append(_ask(url, model, p, ANSWER_TOKENS)[1]))  # type: ignore[misc]
        for prompt in prompts
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return statistics.median(found)


def _ask(url: str, model: str, prompt: list[int], tokens: int) -> tuple[float, float]:
    """TTFT and TPOT of one streamed answer."""
    connection = _connection(url)
    sampling = {"max_new_tokens": tokens, "temperature": 0, "ignore_eos": True}
    body = {"model": model, "input_ids": prompt, "sampling_params": sampling, "stream": True}
    began = perf_counter()
    connection.request("POST", "/generate", json.dumps(body), {"Content-Type": "application/json"})
    response = connection.getresponse()
    if response.status != http.client.OK:
        raise SystemExit(response.read().decode())
    first = None
    for line in response:
        if line.startswith(b"data:") and first is None:
            first = perf_counter()
    last = perf_counter()
    connection.close()
    assert first is not None, "an answer without a token"
    return first - began, (last - first) / max(1, tokens - 1)


def _connection(url: str) -> http.client.HTTPConnection:
    parts = urlsplit(url)
    return http.client.HTTPConnection(parts.hostname or "127.0.0.1", parts.port, timeout=60)


def _get(url: str, path: str) -> bytes:
    connection = _connection(url)
    connection.request("GET", path)
    return connection.getresponse().read()


if __name__ == "__main__":
    raise SystemExit(main())
