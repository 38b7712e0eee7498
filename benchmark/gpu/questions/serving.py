"""1. Does stock SGLang serve an 8B on this machine, with the cut-down kernel wheel, Triton attention and PyTorch sampling?

Decides whether everything that goes through SGLang can be developed and measured on a machine that reaches no registry, whether
CUDA graphs may stay on in that set-up, and what a cold start costs: the number that warm workers are there to beat.
"""

from __future__ import annotations

import re
import statistics
from pathlib import Path

from benchmark.gpu import stock_engine
from benchmark.gpu.answer import Answer
from benchmark.gpu.partner import Partner, PartnerLost

TELLING = re.compile(r"Load weight end|KV Cache is allocated|[Cc]apture .*(begin|end)|max_total_num_tokens|mem usage")


def answer(answer: Answer, *, rehearse: bool) -> None:
    with stock_engine.temporary_folder() as folder:
        attempts = [("with CUDA graphs", {}, 180.0), ("without CUDA graphs", {"disable_cuda_graph": True}, 100.0)]
        for number, (how, arguments, patience_s) in enumerate(attempts):
            home = Path(folder, str(number))
            with stock_engine.start(home, rehearse=rehearse, **arguments) as engine:
                try:
                    standing = engine.told(patience_s)
                    serve(answer, engine, standing, how, rehearse=rehearse)
                except PartnerLost as lost:
                    answer.fact(f"serves {how}", f"no: {lost}")
                    print(f"--- the engine's log, {how}", *engine.last_lines(80), sep="\n")
                    continue
                finally:
                    log = engine.log.read_text(errors="replace").splitlines()
                    answer.fact(f"what it logged, {how}", "\n".join(line for line in log if TELLING.search(line)))
            answer.fact(f"serves {how}", "yes")
            return
    raise RuntimeError("it serves neither with CUDA graphs nor without")


def serve(answer: Answer, engine: Partner, standing: dict[str, float], how: str, *, rehearse: bool) -> None:
    first = engine.ask(120, batch=1, prompt=16, new=1, seed=1)
    answer.figure(f"import SGLang's engine, {how}", standing["import_s"], "s")
    answer.figure(f"start its processes, {how}", standing["engine_s"], "s")
    answer.figure(f"first token after that, {how}", first["s"], "s")
    answer.figure(f"import to first token, {how}", standing["import_s"] + standing["engine_s"] + first["s"], "s")

    again = [engine.ask(batch=1, prompt=24, new=8, seed=7)["tokens"] for _ in range(2)]
    answer.fact("the same prompt twice gives the same tokens", again[0] == again[1])
    new = 4 if rehearse else 65
    for batch in (1, 2) if rehearse else (1, 16, 32):
        per_step = []
        for repetition in range(1 if rehearse else 3):
            # Both prompts are new to the prefix cache; the difference is decoding alone.
            one = engine.ask(batch=batch, prompt=32, new=1, seed=1000 + batch * 10 + repetition)["s"]
            many = engine.ask(batch=batch, prompt=32, new=new, seed=2000 + batch * 10 + repetition)["s"]
            per_step.append((many - one) / (new - 1))
        step_s = statistics.median(per_step)
        answer.samples(f"decode step, batch {batch}, {how}", [s * 1e3 for s in per_step], "ms")
        answer.figure(f"decode, batch {batch}, {how}", batch / step_s if step_s > 0 else 0.0, "tokens/s")
    prompt = 128 if rehearse else 8192
    prefills = [engine.ask(120, batch=1, prompt=prompt, new=1, seed=3000 + repetition)["s"] for repetition in range(3)]
    answer.samples(f"prefill of {prompt} tokens, {how}", [prompt / s for s in prefills], "tokens/s")
