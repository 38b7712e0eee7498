"""Where OpenTelemetry's spans go, as its own variables say."""

from __future__ import annotations

import os
from collections.abc import Mapping
from importlib.metadata import entry_points
from typing import Final

from chimera.errors import ConfigError

GROUP: Final = "opentelemetry_traces_exporter"
"""The entry points under which exporters are installed."""
_INSTALL: Final = "pip install 'chimera-serving[traces]'"


def trace_exporter(environment: Mapping[str, str] = os.environ) -> str:
    """The entry point of the exporter that is asked for. ConfigError when it is not installed."""
    name = environment.get("OTEL_TRACES_EXPORTER") or "otlp"
    if name == "otlp":
        grpc = environment.get("OTEL_EXPORTER_OTLP_PROTOCOL") == "grpc"
        name = "otlp_proto_grpc" if grpc else "otlp_proto_http"
    found = next(iter(entry_points(group=GROUP, name=name)), None)
    if found is None:
        raise ConfigError.single("--traces", f"OpenTelemetry's exporter {name} is not installed", hint=_INSTALL)
    try:
        found.load()
    except ImportError as fault:  # said here once, and not by each process as often as it is started
        raise ConfigError.single("--traces", f"OpenTelemetry's exporter {name} is incomplete: {fault}", hint=_INSTALL) from None
    return name
