"""The latencies that each model owes in a run. Later words win: what its placement says, flags, a calibration times a scale."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import msgspec

from chimera.bench.record import Record, stories
from chimera.core.metrics import percentile
from chimera.core.model import Slo
from chimera.errors import ConfigError

CALIBRATED_PERCENT = 95


def promised(
    models: Iterable[str],
    placed: Mapping[str, Slo],
    *,
    ttft_ms: float | None = None,
    tpot_ms: float | None = None,
    measured: Mapping[str, Slo] | None = None,
    ttft_scale: float = 1.0,
    tpot_scale: float = 1.0,
) -> dict[str, Slo]:
    """For each model; the scales multiply whatever was found, as docs/metrics.md has it."""
    for name, value in (("--slo-ttft-ms", ttft_ms), ("--slo-tpot-ms", tpot_ms)):
        if value is not None and not value > 0:
            raise ConfigError.single(name, f"it is {value:g}; it has to be above zero")
    for name, scale in (("--ttft-slo-scale", ttft_scale), ("--tpot-slo-scale", tpot_scale)):
        if not scale > 0:
            raise ConfigError.single(name, f"it is {scale:g}; it has to be above zero")
    found = {}
    for model in models:
        slo = (measured or {}).get(model) or placed.get(model) or Slo()
        ttft_s = slo.ttft_s if ttft_ms is None else ttft_ms / 1000
        tpot_s = slo.tpot_s if tpot_ms is None else tpot_ms / 1000
        found[model] = Slo(
            ttft_s=None if ttft_s is None else ttft_s * ttft_scale,
            tpot_s=None if tpot_s is None else tpot_s * tpot_scale,
        )
    return found


def calibrated(records: Iterable[Record]) -> dict[str, Slo]:
    """The 95th percentile of each model in a run in which nobody had to wait for another."""
    ttfts: dict[str, list[float]] = {}
    tpots: dict[str, list[float]] = {}
    for story in stories(records):
        if story.ttft_s is not None:
            ttfts.setdefault(story.model, []).append(story.ttft_s)
        if story.tpot_s is not None:
            tpots.setdefault(story.model, []).append(story.tpot_s)
    return {model: Slo(ttft_s=_late(values), tpot_s=_late(tpots.get(model, []))) for model, values in ttfts.items()}


def _late(values: list[float]) -> float | None:
    return percentile(sorted(values), CALIBRATED_PERCENT) if values else None


def read_slos(document: bytes, source: str) -> dict[str, Slo]:
    """`{"model": {"ttft_s": …, "tpot_s": …}}`, as a calibration is kept."""
    try:
        return msgspec.json.decode(document, type=dict[str, Slo])
    except msgspec.DecodeError as fault:
        raise ConfigError.single(source, f"holds no SLOs: {fault}") from None
