"""Prism's command line: its flags are taken, and those that have gone say so once."""

from __future__ import annotations

import argparse
from pathlib import Path

import pytest
from chimera import launch_multi_model_server
from chimera.cli import serve


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[argparse.Namespace]:
    """What `chimera serve` is asked for, instead of serving."""
    requests: list[argparse.Namespace] = []

    def run(arguments: argparse.Namespace) -> int:
        requests.append(arguments)
        return 0

    monkeypatch.setattr(serve, "run", run)
    return requests


def test_a_placement_file_is_served_where_prism_would(asked: list[argparse.Namespace]) -> None:
    words = ["--model-config-file", "models.json", "--host", "0.0.0.0", "--port", "30001", "--enable-elastic-memory"]
    assert launch_multi_model_server.main(words) == 0
    assert (asked[0].what, asked[0].host, asked[0].port, asked[0].static) == (["models.json"], "0.0.0.0", 30001, False)


def test_without_elastic_memory_pools_are_reserved(asked: list[argparse.Namespace]) -> None:
    launch_multi_model_server.main(["--model-config-file", "models.json"])
    assert asked[0].static


def test_every_flag_of_prism_is_taken_and_what_has_gone_says_so_once(
    asked: list[argparse.Namespace], capsys: pytest.CaptureFixture[str]
) -> None:
    words = "--model-config-file f.json --host h --port 1 --max-mem-usage 1 --max-memory-pool-size 1 --enable-elastic-memory"
    words += " --use-kvcached-v0 --use-emm-v0 --enable-cpu-share-memory --enable-worker-pool --workers-per-gpu 2 --num-gpus 2"
    words += " --enable-model-service --num-model-service-workers 4 --async-loading --enable-controller --enable-gpu-scheduler"
    words += " --policy simple-global --abort-exceed-slos --log-file out/server.log --disable-cuda-graph --disable-radix-cache"
    words += " --load-format dummy"
    assert launch_multi_model_server.main(words.split()) == 0
    said = capsys.readouterr().err.splitlines()
    gone = [line.split()[0] for line in said]
    assert len(gone) == len(set(gone)) == 10
    assert {"--max-mem-usage", "--load-format"} < set(gone)
    assert not {"--host", "--num-gpus", "--log-file", "--policy"} & set(gone)
    assert (asked[0].num_gpus, asked[0].log_dir, asked[0].policy) == (2, Path("out/server"), "simple-global")
    assert asked[0].enable_cpu_share_memory and asked[0].enable_worker_pool and asked[0].async_loading
    assert (asked[0].workers_per_gpu, asked[0].num_model_service_workers) == (2, 4)


@pytest.mark.parametrize(
    ("written", "folder"), [("server.log", "server"), ("../logs/server", "../logs/server"), ("v1.2/server", "v1.2/server")]
)
def test_logs_go_into_the_folder_that_the_log_file_would_have_been(
    asked: list[argparse.Namespace], written: str, folder: str
) -> None:
    launch_multi_model_server.main(["--model-config-file", "f.json", "--log-file", written])
    assert asked[0].log_dir == Path(folder)


def test_a_fault_is_one_line_and_a_status(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert launch_multi_model_server.main(["--model-config-file", str(tmp_path / "nothing.json"), "--port", "0"]) == 1
    assert "nothing.json" in capsys.readouterr().err
