"""What each verb's `--help` shows at its end: command lines to start from. A test parses every one of them."""

from __future__ import annotations

import textwrap

FIRST_STEPS = """\
first steps:
  chimera doctor                      what this machine has, and what it lacks
  chimera models make models          small models, without a download
  chimera serve models/llama models/qwen3
  chimera chat llama -m "Good morning"

`chimera VERB --help` has examples of each verb."""

_OF = {
    "serve": """
        chimera serve placement.json                          what the file says, on the GPUs of this machine
        chimera serve placement.json --policy flexible        the server decides what runs where
        chimera serve models/llama models/qwen3               two checkpoints, with no file at all
        chimera serve placement.json --virtual-gpus 8x2GiB    no GPU: memory budgets of this host stand in
        chimera serve placement.json --engine simulated       no engines either: latencies and made-up words
        chimera serve placement.json --host 0.0.0.0 --keys keys.jsonl""",
    "build-images": """
        chimera build-images placement.json --image-dir /dev/shm/images
        chimera build-images models/llama models/qwen3 --image-dir images --cpu-share-memory 64GiB""",
    "check": """
        chimera check placement.json
        chimera check placement.json --gpus 8x80GB            held against GPUs that are elsewhere
        chimera check --schema                                for an editor that completes JSON""",
    "chat": """
        chimera chat llama                                    line by line, until Ctrl-D
        chimera chat llama -m "Good morning" --max-tokens 40  one question, one answer""",
    "load": """
        chimera load llama                                    where it stood last, or on the emptiest GPU
        chimera load llama --gpus 0,1""",
    "unload": """
        chimera unload llama                                  open answers end first
        chimera unload llama --now                            they go on elsewhere, or later""",
    "pin": """
        chimera pin llama
        chimera pin llama --off""",
    "keys": """
        chimera keys alice >> keys.jsonl                      the key is shown once, on the screen only
        chimera keys bob --models llama,qwen3 --requests-per-minute 60
        chimera keys root --admin                             may load and unload models""",
    "memory": """
        chimera memory --watch""",
    "top": """
        chimera top
        chimera top --once                                    one picture, also into a file""",
    "explain": """
        chimera explain                                       the last ten minutes
        chimera explain llama --since 1h
        chimera explain chatcmpl-4f2a                         one request, by the id that its answer had
        chimera explain --at 14:03:20""",
    "policy": """
        chimera policy                                        who decides now
        chimera policy flexible --local goodput               from now on""",
    "simulate": """
        chimera simulate --models placement.json --gpus 8xH100 --trace trace.csv
        chimera simulate --models placement.json --gpus 8xH100 --trace trace.csv --policy static,kvpr,flexible --seeds 5""",
    "plan": """
        chimera plan --models placement.json --trace trace.csv --gpu H100 --target 99%
        chimera plan --models placement.json --trace trace.csv --gpu-hour-price 2.50 --placement planned.json
        chimera plan --models placement.json --trace trace.csv --rate-scale 1,2,4 --add llama     what if""",
    "bench": """
        chimera bench serve --rate 4 --seconds 60
        chimera bench compare --policies static,flexible --trace trace.csv
        chimera bench report bench-results --out bench-report""",
    "models": """
        chimera models make models
        chimera models make models --only llama,qwen3""",
    "replay-decisions": """
        chimera replay-decisions logs/control.decisions.jsonl""",
    "completion": """
        chimera completion bash > ~/.local/share/bash-completion/completions/chimera
        chimera completion zsh >> ~/.zshrc""",
}


def of(verb: str) -> str | None:
    """`None` where the options say it all."""
    lines = _OF.get(verb)
    return None if lines is None else "examples:\n" + textwrap.indent(textwrap.dedent(lines).strip("\n"), "  ")
