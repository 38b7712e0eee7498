"""schemathesis over the OpenAPI document of a whole server: no server error, and no answer that the document does not have."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.serve.house import house

ENDLESS = ("/models/events", "/models/sse", "/sight")
FOR_ALL = "/unload"
"""Without a name in it, so that it would take away the models that everything else asks for."""
CHECKS = "no_fault,status_code_conformance,content_type_conformance,response_schema_conformance"


@pytest.mark.slow
def test_no_server_error_and_no_undocumented_answer(tmp_path: Path, entries: Path) -> None:
    with house(entries) as served:
        host, port = served.address
        command = [sys.executable, "-m", "schemathesis.cli", "run", f"http://{host}:{port}/openapi.json"]
        command += [word for path in (*ENDLESS, FOR_ALL) for word in ("--exclude-path", path)]
        command += ["--checks", CHECKS, "--phases", "coverage,fuzzing", "--max-examples", "10", "--seed", "1", "--no-color"]
        command += ["--request-timeout", "20"]
        environment = os.environ | {
            "SCHEMATHESIS_HOOKS": "schemathesis_hooks",
            "PYTHONPATH": os.pathsep.join([str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")]),
        }
        ended = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True, timeout=500)
        said = ended.stdout.partition("FAILURES")[2][:8000]
        assert ended.returncode == 0, said
        tested = re.search(r"(\d+) generated, (\d+) passed", ended.stdout)
        assert tested is not None and int(tested[1]) == int(tested[2]) > 1000, said
        assert not any("fault while answering" in line for line in served.logs())
        assert served.ask("PUT", "/policy", {"policy": "flexible"})[0] == 200, "policy and models are as it left them"
        assert served.ask("POST", "/models/load", {"model": "m"})[0] == 200
        assert served.complete("m")[0] == 200
