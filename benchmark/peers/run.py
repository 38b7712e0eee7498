"""chimera and its peers under the same requests: two models whose bursts alternate, on the same memory.

    python -m benchmark.peers.run [--peers sglang] [--at NAME=URL …]

`sglang` is started here, one server per model with half of the memory each. Anything else that speaks OpenAI's API is
measured at its URL, with the models' names as chimera has them. What cannot be had here is said, and why.
"""

from __future__ import annotations

import argparse
import asyncio
import importlib.metadata
import sys
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

from chimera.bench import page
from chimera.bench.campaign import Arm, compare, comparison
from chimera.bench.stream import Target
from chimera.core.model import Slo

from benchmark import suite
from benchmark.peers import stock_sglang
from benchmark.report import Figures, parser
from benchmark.served import MODELS, entry, served

KV_BYTES_PER_TOKEN = 4096
"""Of the tiny Qwen3 in float32."""
ABSENT = {
    "vllm": "its wheels on PyPI need an NVIDIA GPU: there, pip install vllm, start one per model, and give --at vllm=URL",
    "kvcached": "patches vLLM or SGLang on an NVIDIA GPU: pip install kvcached there, and give --at kvcached=URL",
    "Prism": "a fork of SGLang 0.3.4 with torch 2.4, not on PyPI: start its server, and give --at prism=URL",
    "ServerlessLLM": "needs Ray and an NVIDIA GPU: pip install serverless-llm there, and give --at serverlessllm=URL",
    "llama-swap": "a Go program, not on PyPI: start it, and give --at llama-swap=URL",
}


def main() -> int:
    options = parser(__doc__)
    options.add_argument("--peers", nargs="*", choices=("sglang",), default=["sglang"], help="to be started")
    options.add_argument("--at", nargs="*", default=[], metavar="NAME=URL", help="already there")
    options.add_argument("--out", type=Path, default=Path("bench-results/peers"), help="default: %(default)s")
    arguments = options.parse_args()
    arguments.out.mkdir(parents=True, exist_ok=True)
    figures = Figures("peers", seed=arguments.seed, facts={"sglang": importlib.metadata.version("sglang")})
    for name, why in ABSENT.items():
        if not any(word.lower().startswith(name.lower()) for word in arguments.at):
            print(f"# {name} is not run: {why}")
    runs = asyncio.run(measure(arguments))
    print(comparison(runs))
    ours = next(found.metrics.ttft_attainment for found, _ in runs if found.name == "chimera")
    for found, _ in runs:
        figures.add(f"{found.name}, answered", found.metrics.answered, "requests")
        figures.add(f"{found.name}, first token within {suite.TTFT_S:g} s", 100 * found.metrics.ttft_attainment, "%")
        if found.name == "sglang":
            figures.add(
                "TTFT attainment, chimera against stock SGLang",
                ours / max(1e-9, found.metrics.ttft_attainment),
                "×",
                at_least=1,
            )
    page.write(arguments.out, "Peers", runs)
    return figures.finish(arguments.json)


async def measure(arguments: argparse.Namespace) -> suite.Runs:
    runs: suite.Runs = []
    trace = suite.burst_trace()
    models = [entry(name, "qwen3", {"gpu_ids": [0], "on": True}) for name in ("a", "b")]
    with served({"gpus": suite.BURST_GPU, "models": models}) as url:
        ready = await suite.prepared(arguments.out, url, trace, arguments.seed, Slo(ttft_s=suite.TTFT_S))
        arms = [Arm("chimera", ready.target)]
        for word in arguments.at:
            name, _, address = word.partition("=")
            arms.append(Arm(name, Target(address)))
        runs += await compare(ready, arms, 1)
    if "sglang" in arguments.peers:
        half = int(suite.HALF_GB * 1e9) // KV_BYTES_PER_TOKEN
        with ExitStack() as stack:
            urls = stack.enter_context(
                stock_sglang.fleet(dict.fromkeys(("a", "b"), MODELS / "qwen3"), dict.fromkeys(("a", "b"), half))
            )
            targets = {name: Target(url) for name, url in urls.items()}
            arm = Arm("sglang", targets["a"], elsewhere=targets)
            runs.append(await replace(ready, facts={**ready.facts, "peer": "stock SGLang, half each"}).run_with_records(arm))
    return runs


if __name__ == "__main__":
    sys.exit(main())
