"""What Prometheus reads: one page for the whole server, whichever front-end is asked."""

from __future__ import annotations

import asyncio
import re
import shutil
import subprocess
import time

import msgspec
import pytest
from chimera.core.gpu import Gpu
from chimera.core.lease import Lease, LeaseClass
from chimera.core.ledger_view import Entry, GpuLedgerView
from chimera.core.measures import MOST_MODELS, OTHERS, Measures, Steps, Tally
from chimera.core.model import Slo
from chimera.core.record import RequestRecord
from chimera.core.replica import Epoch, ReplicaId, ReplicaState
from chimera.core.snapshot import ReplicaView, Snapshot
from chimera.server import metrics
from chimera.server.answer import new_request_id
from prometheus_client.parser import text_string_to_metric_families

from tests.server.conftest import Stage

Samples = dict[tuple[str, tuple[tuple[str, str], ...]], float]


def record(model: str = "m", **changes: object) -> RequestRecord:
    plain = RequestRecord(
        request_id="r",
        model=model,
        arrived_s=10.0,
        first_token_s=10.05,
        ended_s=10.95,
        prompt_tokens=7,
        output_tokens=10,
        outcome="stop",
        slo=Slo(ttft_s=0.1, tpot_s=0.05),
    )
    return msgspec.structs.replace(plain, **changes)


def snapshot(*names: str) -> Snapshot:
    gpu = Gpu(gpu_id=0, capacity_bytes=1 << 30)
    views = tuple(
        ReplicaView(
            replica=ReplicaId(name),
            epoch=Epoch(1, 1),
            state=ReplicaState.SERVING,
            gpu_ids=(0,),
            running=2,
            queued=3,
            kv_tokens=100,
            kv_used_tokens=25,
        )
        for name in names
    )
    lease = Lease(holder=f"{names[0]}/0", gpu_id=0, lease_class=LeaseClass.KV, revision=1, level=5, held=4)
    ledger = GpuLedgerView(gpu=gpu, entries=(Entry(lease=lease),))
    return Snapshot(now_s=1.0, policy="static", gpus=(gpu,), replicas=views, ledgers=(ledger,), waiting={names[0]: 4})


def measures(*records: RequestRecord) -> Measures:
    counted = Measures(tally=Tally(steps={"m": Steps(tokens=12)}))
    for one in records:
        counted.of(one.model).note(one)
    return counted


def read(page: bytes) -> Samples:
    families = text_string_to_metric_families(page.decode())
    return {(s.name, tuple(sorted(s.labels.items()))): s.value for family in families for s in family.samples}


def told(samples: Samples, name: str, **labels: str) -> float:
    return samples[name, tuple(sorted(labels.items()))]


def test_what_gateways_read_bears_vllms_names() -> None:
    page = read(metrics.page(measures(), snapshot("m")))
    assert told(page, "vllm:num_requests_running", model_name="m", engine="0") == 2
    assert told(page, "vllm:num_requests_waiting", model_name="m", engine="0") == 3 + 4
    assert told(page, "vllm:kv_cache_usage_perc", model_name="m", engine="0") == 0.25
    assert told(page, "vllm:lora_requests_info", max_lora="0", running_lora_adapters="", waiting_lora_adapters="") > 0
    assert told(page, "sglang:token_usage", model_name="m", engine="0") == 0.25


def test_latencies_fall_into_vllms_buckets() -> None:
    page = read(metrics.page(measures(record(), record(first_token_s=10.2)), snapshot("m")))
    name = "vllm:time_to_first_token_seconds"
    assert told(page, f"{name}_bucket", model_name="m", le="0.06") == 1
    assert told(page, f"{name}_bucket", model_name="m", le="+Inf") == 2
    assert told(page, f"{name}_sum", model_name="m") == pytest.approx(0.25)
    assert told(page, "vllm:request_time_per_output_token_seconds_count", model_name="m") == 2
    assert told(page, "sglang:e2e_request_latency_seconds_count", model_name="m") == 2


def test_attainment_is_of_requests_sent() -> None:
    refused = record(first_token_s=None, output_tokens=0, outcome="queue_full")
    late = record(first_token_s=10.5)
    page = read(metrics.page(measures(record(), late, refused, refused), snapshot("m")))
    assert told(page, "chimera_slo_attainment_ratio", model_name="m", promise="ttft") == 0.25
    assert told(page, "chimera_requests_refused_total", model_name="m", reason="queue_full") == 2
    assert told(page, "vllm:request_success_total", model_name="m", finished_reason="stop") == 2


def test_the_ledger_is_told_in_bytes() -> None:
    page = read(metrics.page(measures(), snapshot("m")))
    assert told(page, "chimera_ledger_bytes", gpu="0", **{"class": "kv"}) == 5 * (2 << 20)
    assert told(page, "chimera_lease_bytes", gpu="0", model_name="m", engine="0", **{"class": "kv"}) == 5 * (2 << 20)


def test_a_name_with_markup_or_control_characters_stays_a_label() -> None:
    name = 'a"}\n# TYPE x\x00\x1b[2J\\'
    page = metrics.page(measures(record(name)), snapshot(name))
    assert b"\x00" not in page and b"\x1b" not in page
    assert told(read(page), "vllm:num_requests_running", model_name=metrics.label(name), engine="0") == 2
    assert len(metrics.label("n" * 5000)) < 300


def test_thousands_of_models_do_not_become_series() -> None:
    counted = measures(*(record(f"m{number}") for number in range(3 * MOST_MODELS)))
    assert len(counted.models) == MOST_MODELS + 1
    assert counted.models[OTHERS].sent == 2 * MOST_MODELS


def test_promtool_finds_nothing_but_the_colons_of_the_peers() -> None:
    promtool = shutil.which("promtool")
    if promtool is None:
        pytest.skip("promtool is not installed (Debian: prometheus)")
    counted = measures(record(), record(outcome="queue_full", first_token_s=None))
    counted.count("activate")
    own = _lint(promtool, metrics.page(counted, snapshot("m"), ("own",)))
    assert (own.returncode, own.stderr) == (0, b"")
    complaints = _lint(promtool, metrics.page(counted, snapshot("m"))).stderr.decode().splitlines()
    assert complaints
    for line in complaints:
        name, _, fault = line.partition(" ")
        assert name.startswith(("vllm:", "sglang:")) and fault in _THEIRS, line


_THEIRS = (
    "metric names should not contain ':'",
    # vLLM calls it so, though it is neither.
    'non-counter metrics should not have "_perc" suffix',
    'use base unit "ratio" instead of "perc"',
)


def _lint(promtool: str, page: bytes) -> subprocess.CompletedProcess[bytes]:
    return subprocess.run([promtool, "check", "metrics"], input=page, capture_output=True)


async def test_a_front_end_tells_how_each_request_went(stage: Stage) -> None:
    status, _ = await stage.post("/v1/completions", {"model": "m", "prompt": "hi", "max_tokens": 5})
    assert status == 200
    told_ = await stage.rehearsal.records.get()
    assert (told_.model, told_.outcome, told_.output_tokens, told_.prompt_tokens) == ("m", "length", 5, 3)
    assert told_.arrived_s <= (told_.first_token_s or 0) <= told_.ended_s
    assert (told_.prompt, told_.answer) == ("", "")


def test_names_of_requests_are_in_order_of_time_and_no_two_alike() -> None:
    """The records' index grows at its end then; at random places a commit wrote hundreds of pages."""
    began = f"{time.time_ns() // 1_000_000:012x}"
    names = [new_request_id() for _ in range(1000)]
    ended = f"{time.time_ns() // 1_000_000:012x}"
    moments = [name[:12] for name in names]
    assert began <= moments[0] and moments == sorted(moments) and moments[-1] <= ended
    assert len({name[12:] for name in names}) == 1000
    assert all(re.fullmatch("[0-9a-f]{32}", name) for name in names)


async def test_a_clients_own_name_for_its_request_comes_back(stage: Stage) -> None:
    headers = {"x-request-id": "mine-1", "traceparent": f"00-{'a' * 32}-{'b' * 16}-01"}
    body = {"model": "m", "prompt": "hi", "max_tokens": 2}
    async with stage.client.post(stage.url + "/v1/completions", json=body, headers=headers) as response:
        assert response.headers["x-request-id"] == "mine-1"
    told_ = await stage.rehearsal.records.get()
    assert (told_.client_id, told_.trace) == ("mine-1", headers["traceparent"])
    async with stage.client.post(stage.url + "/v1/completions", json={**body, "model": "no"}, headers=headers) as response:
        assert (response.status, response.headers["x-request-id"]) == (404, "mine-1")


@pytest.mark.parametrize(
    "trace", ["", "00-" + "0" * 32 + "-" + "b" * 16 + "-01", "ff-" + "a" * 32 + "-" + "b" * 16 + "-01", "x"]
)
async def test_a_trace_context_that_is_none_is_dropped(stage: Stage, trace: str) -> None:
    body = {"model": "m", "prompt": "hi", "max_tokens": 2}
    async with stage.client.post(stage.url + "/v1/completions", json=body, headers={"traceparent": trace}) as response:
        assert response.status == 200
    assert (await stage.rehearsal.records.get()).trace == ""


async def test_gaps_between_tokens_are_counted_before_the_request_ends(stage: Stage) -> None:
    stage.rehearsal.hold = True
    asking = asyncio.create_task(stage.post("/v1/completions", {"model": "m", "prompt": "hi", "max_tokens": 3}))
    request = await stage.rehearsal.next_request()
    for _ in range(2):
        await stage.rehearsal.worker.say(request, "a")
    made = 0.0
    page: Samples = {}
    async with asyncio.timeout(5):
        while made < 2:
            async with stage.client.get(stage.url + "/metrics?names=vllm") as response:
                page = read(await response.read())
            made = page.get(("vllm:generation_tokens_total", (("model_name", "m"),)), 0.0)
    assert told(page, "vllm:inter_token_latency_seconds_count", model_name="m") == 1
    asking.cancel()


async def test_families_can_be_chosen_and_a_wrong_one_is_refused(stage: Stage) -> None:
    async with stage.client.get(stage.url + "/metrics?names=own") as response:
        assert response.headers["Content-Type"].startswith("text/plain; version=0.0.4")
        assert b"vllm:" not in await response.read()
    async with stage.client.get(stage.url + "/metrics?names=mine") as response:
        assert response.status == 400
