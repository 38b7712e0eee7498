"""One trace over every process that has a part in a request, sent by an exporter of its user's own; and none without it."""

from __future__ import annotations

import http.client
import json
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
from chimera.tiny.maker import make
from chimera.tiny.shapes import MODELS

from tests.serve.house import PATIENCE_S, House, house, placement, until

pytestmark = pytest.mark.slow
TRACE, SPAN = "ab" * 16, "cd" * 8
EXPORTER = """
import json, os
from opentelemetry.sdk.trace.export import SpanExporter, SpanExportResult

class Lines(SpanExporter):
    def export(self, spans):
        with open(os.environ["LINES"], "a") as file:
            for span in spans:
                told = json.loads(span.to_json(indent=None))
                file.write(json.dumps({**told, "process": os.getpid()}) + "\\n")
        return SpanExportResult.SUCCESS
"""


@pytest.fixture
def file(tmp_path: Path) -> Path:
    make(MODELS["llama"], tmp_path / "llama", seed=0)
    return placement(tmp_path, tmp_path / "llama", {"m": {"step_s": 0.01}})


def ask(served: House, model: str = "m") -> int:
    connection = http.client.HTTPConnection(*served.address, timeout=PATIENCE_S)
    body = json.dumps({"model": model, "prompt": "hello", "max_tokens": 5})
    headers = {"content-type": "application/json", "traceparent": f"00-{TRACE}-{SPAN}-01"}
    connection.request("POST", "/v1/completions", body, headers)
    status = connection.getresponse().status
    connection.close()
    return status


@pytest.mark.skipif(find_spec("opentelemetry.sdk") is None, reason="not shown: no opentelemetry-sdk")
def test_a_trace_goes_through_every_process(file: Path, tmp_path: Path) -> None:
    installed = tmp_path / "installed"
    (installed / "lines-1.dist-info").mkdir(parents=True)
    (installed / "lines.py").write_text(EXPORTER)
    (installed / "lines-1.dist-info" / "METADATA").write_text("Metadata-Version: 2.1\nName: lines\nVersion: 1\n")
    entry = "[opentelemetry_traces_exporter]\nlines = lines:Lines\n"
    (installed / "lines-1.dist-info" / "entry_points.txt").write_text(entry)
    written = tmp_path / "spans"
    environment = {"PYTHONPATH": str(installed), "LINES": str(written), "OTEL_TRACES_EXPORTER": "lines"}
    with house(file, "--traces", environment={**environment, "OTEL_BSP_SCHEDULE_DELAY": "50"}) as served:
        assert ask(served) == 200

        def told() -> dict[str, Any]:
            spans = [json.loads(line) for line in written.read_text().splitlines()] if written.exists() else []
            return {span["name"]: span for span in spans}

        names = {"text_completion m", "dispatch m", "try m", "queue m", "prefill m", "decode m", "activate m", "load m"}
        spans = until(lambda: found if names <= (found := told()).keys() else None, "every span")
        processes = {name: served.of(f"chimera.{name}") for name in ("server", "control", "agent")}
        processes["worker"] = served.worker_of("m")
    parents = {
        "text_completion m": (None, "server"),
        "dispatch m": ("text_completion m", "control"),
        "try m": ("text_completion m", "agent"),
        "queue m": ("try m", "agent"),
        "prefill m": ("try m", "worker"),
        "decode m": ("try m", "worker"),
        "activate m": (None, "control"),
        "load m": ("activate m", "worker"),
    }
    for name, (parent, process) in parents.items():
        span = spans[name]
        assert span["process"] == processes[process], name
        known = spans[parent]["context"]["span_id"] if parent else f"0x{SPAN}" if name.startswith("text") else None
        assert span["parent_id"] == known, name
        traced = spans["activate m"]["context"]["trace_id"] if name in ("activate m", "load m") else f"0x{TRACE}"
        assert span["context"]["trace_id"] == traced, name
        assert span["attributes"]["gen_ai.request.model"] == "m", name


def test_without_traces_no_process_looks_for_opentelemetry(file: Path, tmp_path: Path) -> None:
    wire = tmp_path / "wire" / "opentelemetry"
    wire.mkdir(parents=True)
    (wire / "__init__.py").write_text(f"open({str(tmp_path / 'touched')!r}, 'w').close()\nraise ImportError('not installed')\n")
    with house(file, environment={"PYTHONPATH": str(wire.parent)}) as served:
        assert ask(served) == 200
    assert not (tmp_path / "touched").exists()
