"""The command line, from its words to the files it leaves; and Prism's, word for word."""

from __future__ import annotations

import asyncio
import json
import pickle
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from chimera.bench import campaign, load
from chimera.bench.outcome import read_outcome
from chimera.bench.record import read_records
from chimera.cli.main import main

from benchmark import benchmark
from tests.bench.stand_in import Asked, StandIn, answer

SHORT = ("--seconds", "0.4", "--rate", "40", "--prompt-tokens", "4-8", "--output-tokens", "1-3")


@pytest.fixture(autouse=True)
def a_machine_with_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whether requests were sent in time is another test's; here the machine may be busy."""
    monkeypatch.setattr(load, "LATE_S", 60.0)


@pytest.fixture
async def server() -> AsyncIterator[StandIn]:
    async with StandIn() as stand_in:
        yield stand_in


async def chimera(*words: str) -> int:
    """In a thread, since the server is in this loop."""
    return await asyncio.to_thread(main, ["bench", *words])


async def test_a_run_leaves_its_result_and_its_records(
    server: StandIn, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ("--url", server.url, "--out", str(tmp_path), "--name", "one", "--slo-ttft-ms", "60000", "--output-details")
    assert await chimera("serve", *words, *SHORT) == 0
    found, records = read_outcome(tmp_path / "one.json"), read_records(tmp_path / "one.jsonl")
    assert found.metrics.answered == found.metrics.sent == len(records) > 5
    assert found.metrics.joint_attainment == 1.0 and set(found.by_model) == {"m", "n"}
    assert found.facts["seed"] == 42 and found.facts["machine"]
    assert len(json.loads((tmp_path / "one.json").read_text())["ttfts"]) == len(records)
    assert "Serving Benchmark Result" in capsys.readouterr().out


async def test_a_closed_loop_asks_one_after_the_other(server: StandIn, tmp_path: Path) -> None:
    assert await chimera("serve", "--url", server.url, "--out", str(tmp_path), "--concurrency", "1", *SHORT) == 0
    assert server.most_open == 1


async def test_a_trace_is_mapped_cut_and_clipped(server: StandIn, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    trace = tmp_path / "t.csv"
    rows = "0.0,x,10,2\n0.1,y,90,50\n0.2,z,5,1\n9.0,x,1,1\n"
    trace.write_text("timestamp,model,prompt_tokens,output_tokens\n" + rows)
    words = ("--url", server.url, "--out", str(tmp_path), "--trace", str(trace), "--to", "5", "--map", "y=m")
    assert await chimera("serve", *words) == 0
    posts = [asked.body for asked in server.asked if asked.method == "POST"]
    assert [(body["model"], body["max_tokens"]) for body in posts] == [("n", 2), ("m", 50), ("n", 1)]
    assert len(posts[1]["prompt"].split()) == pytest.approx(50, abs=2), "100 tokens of context, half of them for the answer"
    said = capsys.readouterr().out
    assert "x of the trace is replayed on n" in said
    assert read_outcome(tmp_path / "run.json").facts["cut_to_context"] == 1


async def test_unknown_models_are_refused_by_name(server: StandIn, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert await chimera("serve", "--url", server.url, "--models", "who", *SHORT) == 1
    assert "'who' is not among m, n" in capsys.readouterr().err
    trace = tmp_path / "t.csv"
    trace.write_text("timestamp,model,prompt_tokens,output_tokens\n0,x,1,1\n")
    assert await chimera("serve", "--url", server.url, "--trace", str(trace), "--map", "x=who") == 1
    assert "'x' is mapped to 'who'" in capsys.readouterr().err


async def test_a_server_that_is_not_there_is_said_plainly(capsys: pytest.CaptureFixture[str]) -> None:
    async with StandIn() as gone:
        url = gone.url
    assert await chimera("serve", "--url", url, *SHORT) == 1
    assert "no server answers" in capsys.readouterr().err


async def test_a_server_that_dies_leaves_a_partial_result_and_a_failed_command(tmp_path: Path) -> None:
    async def dies(asked: Asked) -> None:
        if asked.method == "POST" and len(server.asked) > 12:
            server.die()
            return
        await answer(asked)

    async with StandIn(dies) as server:
        words = ("--url", server.url, "--out", str(tmp_path), "--rate", "20", "--seconds", "8", "--output-tokens", "1-2")
        assert await chimera("serve", *words) == 1
    found = read_outcome(tmp_path / "run.json")
    assert "was gone" in found.ending.partial and 0 < found.metrics.answered < found.metrics.sent < found.ending.planned
    assert len(read_records(tmp_path / "run.jsonl")) == found.metrics.sent


async def test_servers_are_compared_and_shown_side_by_side(
    server: StandIn, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    async def refuses(asked: Asked) -> None:
        if asked.method == "POST":
            await asked.json(429, {"error": {"code": "queue_full", "message": "full"}})
        else:
            await answer(asked)

    async with StandIn(refuses) as other:
        words = ("--servers", f"good={server.url}", f"bad={other.url}", "--out", str(tmp_path), "--url", server.url)
        assert await chimera("compare", *words, *SHORT) == 0
    assert "bad − good" in capsys.readouterr().out
    prompts = [[asked.body["prompt"] for asked in s.asked if asked.method == "POST"] for s in (server, other)]
    assert prompts[0] == prompts[1], "the same requests to each"
    assert await chimera("report", str(tmp_path), "--out", str(tmp_path / "report")) == 0
    assert "against bad" in (tmp_path / "report" / "report.html").read_text()


async def test_a_sweep_runs_each_rate(server: StandIn, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ("--rate-scales", "0.5,1", "--slo-ttft-ms", "60000", "--url", server.url, "--out", str(tmp_path))
    assert await chimera("sweep", *words, *SHORT) == 0
    assert "rate at 99 % ttft: 1.00 ×" in capsys.readouterr().out
    assert {path.stem for path in campaign.results_in([tmp_path])} == {"rate-0.500", "rate-1.000"}


async def test_a_calibration_gives_the_slos_of_later_runs(server: StandIn, tmp_path: Path) -> None:
    assert await chimera("calibrate", "--url", server.url, "--out", str(tmp_path), *SHORT) == 0
    slos = tmp_path / "slos.json"
    assert set(json.loads(slos.read_text())) == {"m", "n"}
    words = ("--url", server.url, "--out", str(tmp_path), "--slo-file", str(slos), "--ttft-slo-scale", "1000")
    assert await chimera("serve", *words, *SHORT) == 0
    [first, *_] = read_records(tmp_path / "run.jsonl")
    assert first.slo.ttft_s == pytest.approx(1000 * json.loads(slos.read_text())[first.model]["ttft_s"])


# Prism's three examples.


def many(count: int) -> StandIn:
    async def named(asked: Asked) -> None:
        if asked.path == "/v1/models":
            await asked.json(200, {"data": [{"id": f"model_{number}"} for number in range(1, count + 1)]})
        else:
            await answer(asked)

    return StandIn(named)


class Request:
    """As Prism's trace has it."""

    def __init__(self, adapter: int, req_time: float) -> None:
        self.adapter_dir, self.prompt_len, self.output_len, self.req_time = f"x-{adapter}", 6, 2, req_time


async def prism(*words: str) -> int:
    return await asyncio.to_thread(benchmark.main, words)


@pytest.mark.parametrize("more", [(), ("--enable-elastic-memory",)])
async def test_prisms_synthetic_examples_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, more: tuple[str, ...]) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(benchmark, "SECONDS", 0.5)
    monkeypatch.setattr(benchmark, "LENGTHS", (2, 4))
    async with many(2) as server:
        words = ("--base-url", server.url, "--num-models", "2", "--model-paths", "model_1", "model_2")
        # What answers at once owes microseconds: so many times that, no busy machine misses.
        words += ("--ttft-slo-scale", "20000", "--tpot-slo-scale", "20000")
        assert await prism(*words, "--exp-name", "static_baseline", *more, "--req-rate", "10", "--seed", "42") == 0
    result = json.loads((tmp_path / "benchmark-results/static_baseline.jsonl").read_text())
    assert result["completed"] > 0 and result["run"]["facts"]["mode"] == "synthetic"
    assert result["slo_attainment_by_metric"]["tpot"] == 1
    assert read_records(tmp_path / "output-requests/static_baseline.jsonl")[0].slo.ttft_s is not None


async def test_prisms_large_example_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    requests = [Request(5, 0.1), Request(10, 0.2), Request(99, 0.2), Request(23, 0.3)]
    (tmp_path / "real_trace.pkl").write_bytes(pickle.dumps((["x-5"], requests)))
    async with many(18) as server:
        words = ("--base-url", server.url, "--num-models", "18", "--num-gpus", "8", "--exp-name", "chimera_full")
        more = ("--e2e-benchmark", "--real-trace", "./real_trace.pkl", "--time-scale", "0.01", "--replication", "1")
        assert await prism(*words, *more) == 0
        assert await prism(*words, *more[:-1], "2", "--append") == 0
    lines = (tmp_path / "benchmark-results/chimera_full.jsonl").read_text().splitlines()
    found = [json.loads(line) for line in lines]
    assert set(found[0]["run"]["by_model"]) == {"model_1", "model_2", "model_6", "model_9", "model_7"}
    assert [line["completed"] for line in found] == [5, 10]
