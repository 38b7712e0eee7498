"""What each verb's `--help` shows at its end: command lines to start from. A test parses every one of them."""

from __future__ import annotations

import textwrap

FIRST_STEPS = """\
first steps:
  chimera doctor                   what this machine has, and what it lacks
  chimera models make models       small models, without a download
  chimera serve models/llama models/qwen3
  chimera chat llama -m "Good morning"

`chimera VERB --help` has examples of each verb."""

_OF = {
    "serve": """
        chimera serve placement.json                     what the file says
        chimera serve placement.json --policy flexible   the server decides
        chimera serve models/llama models/qwen3          with no file at all
        chimera serve placement.json --virtual-gpus 8x2GiB
                          without a GPU: memory budgets of this host stand in
        chimera serve placement.json --engine simulated
                          no engines either: latencies and made-up words
        chimera serve placement.json --host 0.0.0.0 --keys keys.jsonl
                          for other machines, and only with a key""",
    "build-images": """
        chimera build-images placement.json --image-dir /dev/shm/images
        chimera build-images models/llama models/qwen3 --image-dir images""",
    "check": """
        chimera check placement.json
        chimera check placement.json --gpus 8x80GB   GPUs that are elsewhere
        chimera check --schema                       for an editor""",
    "chat": """
        chimera chat llama                      line by line, until Ctrl-D
        chimera chat llama -m "Good morning"    one question, one answer""",
    "ps": """
        chimera ps
        chimera ps --json""",
    "load": """
        chimera load llama              where it stood last, or has most room
        chimera load llama --gpus 0,1   here""",
    "unload": """
        chimera unload llama            open answers end first
        chimera unload llama --now      they go on elsewhere, or later""",
    "pin": """
        chimera pin llama
        chimera pin llama --off""",
    "reload": """
        chimera reload                  what has changed in the file happens;
                                        a broken file changes nothing""",
    "keys": """
        chimera keys alice >> keys.jsonl    adds the entry to the file; the
                                            key is shown once, on the screen
        chimera keys bob --models llama,qwen3 --requests-per-minute 60
        chimera keys root --admin           may load and unload models
        chimera serve placement.json --keys keys.jsonl
        CHIMERA_API_KEY=sk-... chimera chat llama""",
    "status": """
        chimera status
        chimera status --json""",
    "memory": """
        chimera memory --watch""",
    "top": """
        chimera top
        chimera top --once              one picture, also into a file""",
    "explain": """
        chimera explain                 the last ten minutes
        chimera explain llama --since 1h
        chimera explain chatcmpl-4f2a   one request, by its answer's id
        chimera explain --at 14:03:20""",
    "policy": """
        chimera policy                              who decides now
        chimera policy flexible --local goodput     from now on""",
    "simulate": """
        chimera simulate --models placement.json --gpus 8xH100 \\
          --trace trace.csv --policy static,kvpr,flexible --seeds 5""",
    "plan": """
        chimera plan --models placement.json --trace trace.csv --gpu H100
        chimera plan --models placement.json --trace trace.csv \\
          --placement planned.json --plots plan.png
        chimera plan --models placement.json --trace trace.csv \\
          --rate-scale 1,2,4 --add llama""",
    "bench": """
        chimera bench serve --rate 4 --seconds 60
        chimera bench compare --policies static,flexible --trace trace.csv
        chimera bench report bench-results --out bench-report""",
    "bench serve": """
        chimera bench serve --rate 4 --seconds 60
        chimera bench serve --trace trace.csv --rate-scale 2
        chimera bench serve --concurrency 8 --most-requests 200
        chimera bench serve --slo-ttft-ms 500 --slo-tpot-ms 50""",
    "bench sweep": """
        chimera bench sweep --slo-ttft-ms 500 --attain 99 --seconds 60""",
    "bench compare": """
        chimera bench compare --policies static,flexible --trace trace.csv
        chimera bench compare --servers ours=http://127.0.0.1:8000 \\
          theirs=http://127.0.0.1:9000 --rate 4 --rounds 2""",
    "bench calibrate": """
        chimera bench calibrate --rate 1 --out calibration
        chimera bench serve --slo-file calibration/slos.json --ttft-slo-scale 5""",
    "bench switch": """
        chimera bench switch --models llama,qwen3 --rounds 10""",
    "bench report": """
        chimera bench report bench-results --out bench-report""",
    "models": """
        chimera models make models
        chimera models make models --only llama,qwen3""",
    "doctor": """
        chimera doctor
        chimera doctor --json""",
    "replay-decisions": """
        chimera replay-decisions logs/control.decisions.jsonl""",
    "completion": """
        chimera completion zsh >> ~/.zshrc
        chimera completion bash >> ~/.bashrc""",
}


def of(verb: str) -> str | None:
    """`None` where the options say it all."""
    lines = _OF.get(verb)
    return None if lines is None else "examples:\n" + textwrap.indent(textwrap.dedent(lines).strip("\n"), "  ")
