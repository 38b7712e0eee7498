"""The replay benchmark against whole servers: what it sees of them, and whether it agrees with others."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from chimera.bench.outcome import read_outcome
from chimera.bench.record import read_records
from chimera.tiny.maker import make
from chimera.tiny.shapes import MODELS

from tests.serve.house import command, house, placement

ROOT = Path(__file__).parents[2]
pytestmark = pytest.mark.slow


def figures(script: str, *words: str, out: Path) -> dict[str, float]:
    """Of a script; whether its goals were met is for a quiet machine to say."""
    subprocess.run([sys.executable, str(ROOT / "benchmark" / script), "--json", str(out), *words], cwd=ROOT, timeout=300)
    return {figure["name"]: figure["value"] for figure in json.loads(out.read_text())["figures"]}


def test_it_agrees_with_sglangs_own_benchmark_and_with_the_server(tmp_path: Path) -> None:
    words = ("--engine", "simulated", "--rounds", "2", "--requests", "25")
    found = figures("agreement.py", *words, out=tmp_path / "out.json")
    for word in ("ttft", "tpot", "e2e_latency"):
        assert found[f"median {word}, difference"] <= 10, "3 % on a quiet machine"
    assert -1 <= found["TTFT here less the server's own"] <= 3, "1 ms on a quiet machine"


def test_a_chimera_server_is_watched_while_it_is_measured(tmp_path: Path) -> None:
    make(MODELS["llama"], tmp_path / "models" / "llama", seed=0)
    costs = {"step_s": 0.002, "load_s": 0.05}
    file = placement(tmp_path, tmp_path / "models" / "llama", {"m": costs, "n": costs}, gpus=2)
    with house(file, "--policy", "static") as server:
        url = "http://{}:{}".format(*server.address)
        words = ["--url", url, "--out", str(tmp_path), "--seconds", "3", "--rate", "10", "--output-tokens", "2-6"]
        subprocess.run(command("bench", "serve", *words, "--name", "seen"), check=False, env=os.environ)
        assert server.ask("PUT", "/policy", {"policy": "time-sharing"})[0] == 200, (
            "static answers nothing for a model that is down"
        )
        subprocess.run(command("bench", "switch", "--url", url, "--out", str(tmp_path), "--rounds", "2"), check=True)
        for policy in ("static", "flexible"):
            assert server.ask("PUT", "/policy", {"policy": policy})[0] == 200
    found, records = read_outcome(tmp_path / "seen.json"), read_records(tmp_path / "seen.jsonl")
    assert all(record.answered and record.output_tokens == record.wanted_tokens for record in records)
    assert all(record.prompt_tokens in range(256, 513) for record in records)
    assert len(found.sighting.gpus) == 2 and {stay.model for stay in found.sighting.stays} == {"m", "n"}
    assert len(found.sighting.samples) >= 5 and found.figures["memory_peak_bytes"] > 0
    switched = json.loads((tmp_path / "switch.json").read_text())["switches"]
    assert len(switched) == 4 and all(one["load_s"] >= 0.05 and one["cold_ttft_s"] > one["warm_ttft_s"] > 0 for one in switched)
