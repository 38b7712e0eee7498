"""What elastic KV memory costs on a GPU: two models in the shape of a 3B side by side, static pools against leases.

    python benchmark/gpu/elastic.py [--json FILE]
    python benchmark/gpu/elastic.py --rehearse        # every line of it, with tiny models on a CPU; judges nothing

CUDA graphs and the radix cache are on in both. Blocks of the same arrivals alternate between the static pair and the elastic
pair, whose level never moves, on one device in one run; Prism's elastic pool cost 4 % of the time to first token and 13 % of
the time per output token at 32 requests a second. A figure is the median over blocks of the ratio of medians.
"""

from __future__ import annotations

import json
import random
import select
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

# Run as a script, perhaps where the package is not installed.
sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "python"))
sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from chimera.core.model import ModelSpec
from chimera.msg.actions import FirstLease
from chimera.units import GIB, MIB

from benchmark.micro.workers import TOKEN_BYTES, Agency, Hand, tiny
from benchmark.report import Figures, parser

SHAPE: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 3072,
    "intermediate_size": 8192,
    "num_hidden_layers": 28,
    "num_attention_heads": 24,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "vocab_size": 128256,
    "max_position_embeddings": 16384,
    "rms_norm_eps": 1e-5,
    "rope_theta": 500000.0,
    "hidden_act": "silu",
    "torch_dtype": "bfloat16",
    "tie_word_embeddings": True,
    "bos_token_id": 128000,
    "eos_token_id": 128001,
}
"""Llama-3.2-3B's."""
SHAPE_TOKEN_BYTES = 28 * 2 * 8 * 128 * 2
RATE_PER_S = 32.0
BLOCK_S = 8.0
PROMPT, ANSWER = (128, 1024), (32, 128)
POOL_BYTES = 16 * GIB
PAGE_BYTES = 2 * MIB


class Latencies:
    def __init__(self) -> None:
        self.ttft_s: list[float] = []
        self.tpot_s: list[float] = []


def block(hands: list[Hand], seed: int, *, rate: float, seconds: float, vocabulary: int, scale: float) -> Latencies:
    """Poisson arrivals for both models, and every answer to its end."""
    chance = random.Random(seed)
    arrivals: list[tuple[float, int, list[int], int]] = []
    at_s = 0.0
    while (at_s := at_s + chance.expovariate(rate)) < seconds:
        prompt = [chance.randrange(3, vocabulary) for _ in range(round(chance.randint(*PROMPT) * scale))]
        arrivals.append((at_s, chance.randrange(len(hands)), prompt, max(4, round(chance.randint(*ANSWER) * scale))))
    found, begun_s = Latencies(), time.monotonic()
    asked: dict[str, float] = {}
    first: dict[str, tuple[float, int]] = {}
    while arrivals or asked:
        now = time.monotonic()
        while arrivals and begun_s + arrivals[0][0] <= now:
            _, which, prompt, tokens = arrivals.pop(0)
            asked[hands[which].submit(prompt, tokens)] = now
        patience_s = 1.0 if not arrivals else max(0.0, begun_s + arrivals[0][0] - now)
        select.select([number for hand in hands for number in hand.filenos], [], [], patience_s)
        now = time.monotonic()
        for hand in hands:
            for delta in hand.hear():
                if delta.request_id not in first:
                    first[delta.request_id] = (now, 0)
                    found.ttft_s.append(now - asked[delta.request_id])
                began_s, made = first[delta.request_id]
                first[delta.request_id] = (began_s, made + len(delta.token_ids))
                if delta.outcome is not None:
                    found.tpot_s.append((now - began_s) / max(1, first[delta.request_id][1] - 1))
                    del asked[delta.request_id]
    return found


def models(folder: Path, *, rehearse: bool) -> list[ModelSpec]:
    if rehearse:
        return [tiny(name, folder) for name in ("llama", "qwen3")]
    specs = []
    for name in ("first", "second"):
        (folder / name).mkdir()
        (folder / name / "config.json").write_text(json.dumps(SHAPE))
        path = str(folder / name)
        arguments = {"load_format": "dummy", "attention_backend": "triton", "sampling_backend": "pytorch"}
        specs.append(
            ModelSpec(
                name=name,
                path=path,
                tokenizer_path=path,
                architecture="LlamaForCausalLM",
                weight_bytes=7 * GIB,
                kv_bytes_per_token=SHAPE_TOKEN_BYTES,
                context_length=16384,
                engine_args={**arguments, "max_running_requests": 64, "cuda_graph_max_bs_decode": 64},
            )
        )
    return specs


def hire(agency: Agency, specs: list[ModelSpec], pool_bytes: int, page_bytes: int) -> dict[str, list[Hand]]:
    pages = pool_bytes // page_bytes
    lease = FirstLease(page_bytes=page_bytes, revision=1, level=pages, ceiling=pages)
    pairs: dict[str, list[Hand]] = {"static": [], "elastic": []}
    for kind, hands in pairs.items():
        for number, spec in enumerate(specs):
            hand = agency.hire(f"{kind}{number}")
            hand.become(spec, kv_bytes=pool_bytes, lease=lease if kind == "elastic" else None)
            hand.serve([([7] * 64, 8)] * 4, at_once=4)  # warm, and the front-end's socket is there
            hands.append(hand)
    return pairs


def main() -> int:
    options = parser(__doc__)
    options.add_argument("--rehearse", action="store_true", help="tiny models on a CPU")
    options.add_argument("--blocks", type=int, default=12, help="of each pair (default: 12)")
    arguments = options.parse_args()
    rehearse: bool = arguments.rehearse
    figures = Figures("elastic KV memory on a GPU" + (", rehearsed on a CPU" if rehearse else ""), seed=arguments.seed)
    pool, page = (4096 * TOKEN_BYTES, 64 * TOKEN_BYTES) if rehearse else (POOL_BYTES, PAGE_BYTES)
    rate, seconds, scale = (4.0, 1.5, 0.1) if rehearse else (RATE_PER_S, BLOCK_S, 1.0)
    vocabulary = 2000 if rehearse else SHAPE["vocab_size"]
    found: dict[str, list[Latencies]] = {"static": [], "elastic": []}
    with tempfile.TemporaryDirectory(prefix="chimera-bench-") as folder:
        agency = Agency(Path(folder))
        try:
            pairs = hire(agency, models(Path(folder), rehearse=rehearse), pool, page)
            for number in range(arguments.blocks):
                for kind in ("static", "elastic") if number % 2 else ("elastic", "static"):
                    seed = arguments.seed + number
                    found[kind].append(block(pairs[kind], seed, rate=rate, seconds=seconds, vocabulary=vocabulary, scale=scale))
        finally:
            agency.close()
    for word, name in (("ttft_s", "time to first token"), ("tpot_s", "time per output token")):
        medians = {kind: [statistics.median(getattr(b, word)) for b in blocks] for kind, blocks in found.items()}
        for kind, values in medians.items():
            figures.samples(f"{name}, {kind}", [1e3 * value for value in values], "ms")
        ratios = [e / s for e, s in zip(medians["elastic"], medians["static"], strict=True)]
        figures.samples(f"{name}, elastic against static", ratios, "×", at_most=None if rehearse else 1.02, goal="≤ 1.02")
    return figures.finish(arguments.json)


if __name__ == "__main__":
    sys.exit(main())
