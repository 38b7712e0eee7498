"""Where spans go is said in OpenTelemetry's own variables."""

from __future__ import annotations

from importlib.metadata import EntryPoint, EntryPoints, entry_points

import pytest
from chimera.cli.keeping import Keeping
from chimera.config import exporter
from chimera.config.exporter import trace_exporter
from chimera.errors import ConfigError


def test_the_names_of_opentelemetrys_variables_become_exporters(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []

    def installed(*, group: str, name: str) -> EntryPoints:
        asked.append(f"{group}: {name}")
        return EntryPoints([EntryPoint(name, "json:loads", group)])

    monkeypatch.setattr(exporter, "entry_points", installed)
    assert trace_exporter({}) == trace_exporter({"OTEL_TRACES_EXPORTER": "otlp"}) == "otlp_proto_http"
    assert trace_exporter({"OTEL_EXPORTER_OTLP_PROTOCOL": "grpc"}) == "otlp_proto_grpc"
    assert trace_exporter({"OTEL_TRACES_EXPORTER": "console", "OTEL_EXPORTER_OTLP_PROTOCOL": "grpc"}) == "console"
    assert {line.partition(":")[0] for line in asked} == {"opentelemetry_traces_exporter"}


def test_one_that_is_not_installed_is_said_with_what_mends_it() -> None:
    assert not entry_points(group=exporter.GROUP, name="absent")
    with pytest.raises(ConfigError, match=r"--traces: OpenTelemetry's exporter absent is not installed .*\[traces\]"):
        trace_exporter({"OTEL_TRACES_EXPORTER": "absent"})


def test_one_that_lacks_something_is_said_before_anything_is_started(monkeypatch: pytest.MonkeyPatch) -> None:
    broken = EntryPoints([EntryPoint("otlp_proto_http", "no_such_module:Exporter", exporter.GROUP)])
    monkeypatch.setattr(exporter, "entry_points", lambda **_: broken)
    with pytest.raises(ConfigError, match="is incomplete: No module named 'no_such_module'"):
        trace_exporter({})


def test_every_process_is_told_to_send_them() -> None:
    assert Keeping(trace_exporter="console").words_for_all == ["--traces", "console"]
    assert Keeping().words_for_all == []
