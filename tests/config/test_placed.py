"""The placement file that a plan writes."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from chimera.cli.main import main
from chimera.config.deployment import load_placement
from chimera.core.replica import ReplicaId

SLO = {"ttft_ms": 200, "tpot_ms": 40}


def test_the_placement_file_is_one_that_serve_reads(
    tmp_path: Path, make_model: Callable[..., Path], write: Callable[..., Path]
) -> None:
    for name in ("one", "two"):
        make_model(name)
    rows = "".join(f"{n * 0.1:.1f},{('one', 'two')[n % 2]},{50 + n},{10 + n % 20}\n" for n in range(50))
    (tmp_path / "trace.csv").write_text("timestamp,model,prompt_tokens,output_tokens\n" + rows)
    entries = [{"model_name": name, "model_path": name, "aliases": [f"{name}st"], "slo": SLO} for name in ("one", "two")]
    source = write({"models": entries, "gpus": "1x2GiB", "policy": "static"}, "mine.json")
    out = tmp_path / "there" / "planned.json"
    out.parent.mkdir()
    words = ["--trace", str(tmp_path / "trace.csv"), "--quiet", "--days", "2", "--slo-scale", "2"]
    assert main(["plan", "--models", str(source), *words, "--policy", "flexible", "--placement", str(out)]) == 0
    deployment = load_placement(out, None)
    assert deployment.policy == "flexible"
    assert {seat.replica for seat in deployment.placement.seats} >= {ReplicaId("one", 0), ReplicaId("two", 0)}
    assert [(m.aliases, m.slo.ttft_s) for m in deployment.models] == [(("onest",), 0.4), (("twost",), 0.4)]
    assert list(out.parent.iterdir()) == [out], "no draft is left"
