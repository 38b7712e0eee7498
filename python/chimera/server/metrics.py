"""The page that Prometheus reads: measures and snapshot in its text format. Pure; the words are those of docs/metrics.md.

Whatever vLLM and SGLang measure as well bears their names and buckets, so that their dashboards, and gateways that pick a
server by its queue, read ours. Everything else is `chimera_…`. Labels are registered models, GPUs and words of ours: never
a key, a request or what a client sends.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Sequence
from typing import Final

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.exposition import generate_latest
from prometheus_client.registry import Collector, CollectorRegistry

import chimera
from chimera.core.lease import LeaseClass
from chimera.core.measures import DECISION_S, E2E_S, GAP_S, LOAD_S, TTFT_S, Histogram, Measures, ModelMeasures
from chimera.core.replica import ReplicaState
from chimera.core.snapshot import ReplicaView, Snapshot
from chimera.units import printable

CONTENT_TYPE: Final = "text/plain; version=0.0.4; charset=utf-8"
FAMILIES: Final = ("own", "vllm", "sglang")
_LONGEST_LABEL: Final = 200


def page(measures: Measures, snapshot: Snapshot, families: Sequence[str] = FAMILIES) -> bytes:
    registry = CollectorRegistry()
    registry.register(_Page(measures, snapshot, families))
    return generate_latest(registry)


def label(text: str) -> str:
    """A name as a label: what cannot be printed is spelled out, and nothing is endless."""
    shown = printable(text)
    return shown if len(shown) <= _LONGEST_LABEL else f"{shown[:_LONGEST_LABEL]}…"


class _Page(Collector):
    def __init__(self, measures: Measures, snapshot: Snapshot, families: Sequence[str]) -> None:
        self._measures = measures
        self._snapshot = snapshot
        self._families = families
        self._pages = {gpu.gpu_id: gpu.page_bytes for gpu in snapshot.gpus}

    def collect(self) -> Iterator[Metric]:
        if "own" in self._families:
            yield from self._house()
            yield from self._memory()
            yield from self._replicas()
            yield from self._requests()
        for peer in ("vllm", "sglang"):
            if peer in self._families:
                yield from self._peers_gauges(peer)
                yield from self._peers_counters(peer)
                yield from self._peers_latencies(peer)

    # What is ours alone.

    def _house(self) -> Iterator[Metric]:
        measures, snapshot = self._measures, self._snapshot
        yield _gauges("chimera_info", "What runs here.", ("version", "policy"), [((chimera.__version__, snapshot.policy), 1.0)])
        yield _gauges("chimera_models", "Registered models.", (), [((), float(len(snapshot.models)))])
        yield _counters(
            "chimera_actions",
            "Committed actions and what became of them, by kind.",
            ("action",),
            [((action,), count) for action, count in sorted(measures.actions.items())],
        )
        leases = [((kind,), measures.actions.get(kind, 0)) for kind in ("grant", "recall")]
        yield _counters("chimera_lease_changes", "Leases granted and recalled.", ("direction",), leases)
        yield _counters("chimera_moves", "Replicas started while another of their model stood.", (), [((), measures.moves)])
        yield _counters(
            "chimera_activation_failures", "Activations that failed and workers that were lost.", (), [((), measures.failures)]
        )
        kinds = [((kind,), histogram) for kind, histogram in sorted(measures.activations.items())]
        yield _histograms("chimera_activation_seconds", "From the order to serving, by kind.", ("kind",), kinds, LOAD_S)
        yield _histograms(
            "chimera_decision_seconds", "One event's decision in control.", (), [((), measures.decisions)], DECISION_S
        )
        answers = sorted(measures.tally.answers.items())
        yield _counters("chimera_http_answers", "HTTP answers, by status.", ("code",), [((c,), n) for c, n in answers])
        yield _counters("chimera_records", "Rows kept in the store.", (), [((), measures.records_kept)])
        yield _counters(
            "chimera_records_lost", "Rows the store could not take, as with a full disk.", (), [((), measures.records_lost)]
        )

    def _memory(self) -> Iterator[Metric]:
        snapshot = self._snapshot
        gpus = [((str(gpu.gpu_id), label(gpu.node)), float(gpu.capacity_bytes)) for gpu in snapshot.gpus]
        yield _gauges("chimera_gpu_capacity_bytes", "Memory of the GPU.", ("gpu", "node"), gpus)
        ledger: list[tuple[tuple[str, ...], float]] = []
        free: list[tuple[tuple[str, ...], float]] = []
        leases: dict[tuple[str, ...], float] = {}
        names = {str(view.replica): view for view in snapshot.replicas}
        for view in snapshot.ledgers:
            gpu, page_bytes = str(view.gpu.gpu_id), view.gpu.page_bytes
            ledger += [((gpu, str(kind)), float(pages * page_bytes)) for kind, pages in view.by_class().items()]
            free.append(((gpu,), float(view.free * page_bytes)))
            for entry in view.entries:
                if entry.lease.holder in names and entry.lease.lease_class in (LeaseClass.KV, LeaseClass.WEIGHTS):
                    replica = names[entry.lease.holder].replica
                    key = (gpu, str(entry.lease.lease_class), label(replica.model), str(replica.index))
                    leases[key] = leases.get(key, 0.0) + entry.lease.charged * page_bytes
        yield _gauges("chimera_ledger_bytes", "Memory charged, by GPU and class.", ("gpu", "class"), ledger)
        yield _gauges("chimera_ledger_free_bytes", "Memory that nobody holds.", ("gpu",), free)
        yield _gauges(
            "chimera_lease_bytes", "Memory charged to a replica.", ("gpu", "class", "model_name", "engine"), leases.items()
        )

    def _replicas(self) -> Iterator[Metric]:
        states: list[tuple[tuple[str, ...], float]] = []
        for view in self._snapshot.replicas:
            where = ",".join(map(str, view.gpu_ids))
            states.append(((label(view.replica.model), str(view.replica.index), where, str(view.state)), 1.0))
        yield _gauges("chimera_replica_state", "1 for the state it is in.", ("model_name", "engine", "gpus", "state"), states)
        waiting = [((label(model),), float(count)) for model, count in self._snapshot.waiting.items()]
        yield _gauges("chimera_requests_held", "Waiting because no replica serves them yet.", ("model_name",), waiting)

    def _requests(self) -> Iterator[Metric]:
        models = self._models
        ended = [((name, outcome), n) for name, m in models for outcome, n in sorted(m.outcomes.items())]
        yield _counters("chimera_requests", "Requests that ended, by outcome.", ("model_name", "outcome"), ended)
        refused = [(key, n) for key, n in ended if key[1] not in ("stop", "length", "cancelled")]
        yield _counters("chimera_requests_refused", "Refused or failed, by reason.", ("model_name", "reason"), refused)
        kept = [
            ((name, promise), n)
            for name, m in models
            for promise, n in (("ttft", m.kept_ttft), ("tpot", m.kept_tpot), ("both", m.kept_both))
        ]
        yield _counters("chimera_slo_kept", "Requests that kept their promise.", ("model_name", "promise"), kept)
        sent = dict(models)
        shares = [(key, n / sent[key[0]].sent) for key, n in kept if sent[key[0]].sent]
        yield _gauges("chimera_slo_attainment_ratio", "Share of requests sent that kept it.", ("model_name", "promise"), shares)
        yield _counters(
            "chimera_requeues", "Tries after the first.", ("model_name",), [((name,), m.requeued) for name, m in models]
        )
        yield _counters(
            "chimera_cached_tokens_lost",
            "Cached prefixes that went because memory was recalled.",
            ("model_name",),
            [((name,), m.lost_cached_tokens) for name, m in models],
        )

    # What vLLM and SGLang have names for.

    def _peers_gauges(self, peer: str) -> Iterator[Metric]:
        names = _GAUGES[peer]
        views = [(view, (label(view.replica.model), str(view.replica.index))) for view in self._up()]
        held = {model: count for model, count in self._snapshot.waiting.items() if count}
        waiting: dict[tuple[str, ...], float] = {key: float(view.queued) for view, key in views}
        for model, count in held.items():
            key = (label(model), "0")
            waiting[key] = waiting.get(key, 0.0) + count
        labels = ("model_name", "engine")
        yield _gauges(names[0], "Requests in the batch.", labels, [(key, float(view.running)) for view, key in views])
        yield _gauges(names[1], "Requests that wait.", labels, waiting.items())
        usage = [(key, view.kv_used_tokens / view.kv_tokens if view.kv_tokens else 0.0) for view, key in views]
        yield _gauges(names[2], "KV cache in use; 1 is all of what it may use now.", labels, usage)
        if peer == "vllm":
            adapters = [(("0", "", ""), time.time())]
            names_ = ("max_lora", "running_lora_adapters", "waiting_lora_adapters")
            yield _gauges("vllm:lora_requests_info", "Adapters in use.", names_, adapters)
        else:
            used = [(key, float(view.kv_used_tokens)) for view, key in views]
            yield _gauges("sglang:num_used_tokens", "KV slots in use.", labels, used)

    def _peers_counters(self, peer: str) -> Iterator[Metric]:
        models = self._models
        labels = ("model_name",)
        prompts = [((name,), m.prompt_tokens) for name, m in models]
        cached = [((name,), m.cached_tokens) for name, m in models]
        made = [((label(model),), steps.tokens) for model, steps in sorted(self._measures.tally.steps.items())]
        yield _counters(f"{peer}:prompt_tokens", "Prompt tokens of answered requests.", labels, prompts)
        yield _counters(f"{peer}:generation_tokens", "Tokens that came out.", labels, made)
        if peer == "vllm":
            yield _counters("vllm:prefix_cache_queries", "Prompt tokens looked up.", labels, prompts)
            yield _counters("vllm:prefix_cache_hits", "Prompt tokens found in a cache.", labels, cached)
            ended = [((n, o), c) for n, m in models for o, c in sorted(m.outcomes.items()) if o in ("stop", "length")]
            yield _counters("vllm:request_success", "Answered requests.", ("model_name", "finished_reason"), ended)
        else:
            yield _counters("sglang:cached_tokens", "Prompt tokens found in a cache.", labels, cached)
            sent = [((name,), m.sent) for name, m in models]
            yield _counters("sglang:num_requests", "Requests that ended.", labels, sent)

    def _peers_latencies(self, peer: str) -> Iterator[Metric]:
        models, labels = self._models, ("model_name",)
        gaps = [((label(model),), steps.gaps) for model, steps in sorted(self._measures.tally.steps.items())]
        queue = "request_queue_time_seconds" if peer == "vllm" else "queue_time_seconds"
        for name, what, rows, bounds in (
            ("time_to_first_token_seconds", "TTFT.", [((n,), m.ttft) for n, m in models], TTFT_S),
            ("inter_token_latency_seconds", "From one token to the next.", gaps, GAP_S),
            ("request_time_per_output_token_seconds", "TPOT.", [((n,), m.tpot) for n, m in models], GAP_S),
            ("e2e_request_latency_seconds", "E2E.", [((n,), m.e2e) for n, m in models], E2E_S),
            (queue, "Until an engine was given it.", [((n,), m.queue) for n, m in models], TTFT_S),
        ):
            yield _histograms(f"{peer}:{name}", what, labels, rows, bounds)

    @property
    def _models(self) -> list[tuple[str, ModelMeasures]]:
        return [(label(name), self._measures.models[name]) for name in sorted(self._measures.models)]

    def _up(self) -> list[ReplicaView]:
        return [view for view in self._snapshot.replicas if view.state in (ReplicaState.SERVING, ReplicaState.DRAINING)]


_GAUGES: Final = {
    "vllm": ("vllm:num_requests_running", "vllm:num_requests_waiting", "vllm:kv_cache_usage_perc"),
    "sglang": ("sglang:num_running_reqs", "sglang:num_queue_reqs", "sglang:token_usage"),
}
Rows = Iterable[tuple[tuple[str, ...], float]]


def _gauges(name: str, what: str, labels: tuple[str, ...], rows: Rows) -> Metric:
    family = GaugeMetricFamily(name, what, labels=labels)
    for values, number in rows:
        family.add_metric(values, number)
    return family


def _counters(name: str, what: str, labels: tuple[str, ...], rows: Rows) -> Metric:
    family = CounterMetricFamily(name, what, labels=labels)
    for values, number in rows:
        family.add_metric(values, number)
    return family


def _histograms(
    name: str, what: str, labels: tuple[str, ...], rows: Iterable[tuple[tuple[str, ...], Histogram]], bounds: tuple[float, ...]
) -> Metric:
    family = HistogramMetricFamily(name, what, labels=labels)
    for values, histogram in rows:
        so_far = 0
        buckets: list[tuple[str, float]] = []
        for bound, count in zip((*map(str, bounds), "+Inf"), histogram.counts, strict=True):
            so_far += count
            buckets.append((bound, so_far))
        if so_far:
            family.add_metric(values, buckets, histogram.total)
    return family
