"""A server with keys and a certificate, whole: it comes up, lets in whom it knows, and says https."""

from __future__ import annotations

import http.client
import json
import ssl
import subprocess
from pathlib import Path

import pytest
from chimera.core.access import hash_of
from chimera.tiny.maker import make
from chimera.tiny.shapes import MODELS

from tests.serve.house import house, placement


@pytest.mark.slow
def test_a_server_with_keys_and_a_certificate(tmp_path: Path) -> None:
    cert, key, keys = tmp_path / "cert.pem", tmp_path / "key.pem", tmp_path / "keys.json"
    words = ["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes", "-days", "1"]
    words += ["-subj", "/CN=localhost", "-addext", "subjectAltName=IP:127.0.0.1", "-keyout", str(key), "-out", str(cert)]
    subprocess.run(words, check=True, capture_output=True)
    keys.write_text(json.dumps({"keys": [{"name": "anna", "hash": hash_of("sk-anna")}]}))
    make(MODELS["llama"], tmp_path / "llama", 0)
    file = placement(tmp_path, tmp_path / "llama", {"a": {}})
    flags = ("--keys", str(keys), "--tls-cert", str(cert), "--tls-key", str(key))
    with house(file, *flags, ready=False) as server:
        port = int(server.wait_for(r"ready in .*: https://127.0.0.1:(\d+)")[1])
        trust = ssl.create_default_context(cafile=str(cert))
        statuses = []
        for offered in ("sk-anna", "sk-bert"):
            connection = http.client.HTTPSConnection("127.0.0.1", port, context=trust, timeout=30)
            ask = json.dumps({"model": "a", "prompt": "hello", "max_tokens": 3})
            connection.request("POST", "/v1/completions", ask, {"Authorization": f"Bearer {offered}"})
            statuses.append(connection.getresponse().status)
            connection.close()
        assert statuses == [200, 401]
        assert "sk-anna" not in "".join(server.logs())
