"""`chimera memory`: from a ledger's view to 80 columns, and what it says when there is no ledger to see."""

import http.server
import threading
from collections.abc import Iterator
from contextlib import contextmanager

import msgspec
import pytest
from chimera.cli.main import main
from chimera.cli.memory import read, render
from chimera.core.lease import LeaseClass
from chimera.core.ledger_view import LedgerView
from chimera.errors import ProtocolError
from chimera.ledger.book import GpuLedger, Survivors
from chimera.msg.events import GpuSampled
from chimera.units import GIB

from tests.ledger.builders import AGENT_START, NOW, allot, gpu, ledger_of, life, obeyed, opened


def a_view() -> LedgerView:
    """A settled replica with weights, one that is late with a recall, and one that waits for it."""
    ledger = GpuLedger(gpu(4096), margin_pages=128, agent_start=AGENT_START)
    settled, late, waiting = opened(ledger, "llama", level=1024), opened(ledger, "qwen3", level=1024), opened(ledger, "gemma")
    ledger.reserve(settled.worker, LeaseClass.WEIGHTS, 512, life=life("llama"))
    ledger.reserve(settled.worker, LeaseClass.CONTEXT, 64)
    ledger.on(GpuSampled(gpu_id=0, strangers_bytes=GIB), NOW)
    ledger.on(late.want(2048), NOW)
    allot(ledger, late, 256, deadline_s=NOW - 2.5)
    obeyed(ledger, [waiting], allot(ledger, waiting, 2000)[:])
    return LedgerView(now_s=NOW, gpus=(ledger.view(NOW),))


def test_a_gpu_is_shown_by_class_and_by_holder() -> None:
    assert (
        "\n".join(render(a_view()))
        == """\
GPU 0  virtual (local)                                         0 B free of 8 GiB
  weights       1 GiB    12%   ██████
  kv          5.6 GiB    70%   ████████████████████████████████
  context     128 MiB     2%   █
  margin      256 MiB     3%   █
  strangers     1 GiB    12%   ██████
  HOLDER                 CLASS         LEVEL      HELD    WANTED
  gemma/0                kv          1.6 GiB   1.6 GiB       0 B  waits for more
  llama/0                weights       1 GiB     1 GiB     1 GiB
  llama/0                kv            2 GiB     2 GiB       0 B
  qwen3/0                kv          512 MiB     2 GiB     4 GiB  late 2.5 s
  w-llama                context     128 MiB   128 MiB   128 MiB"""
    )


def test_no_line_is_longer_than_80_columns() -> None:
    ledger = ledger_of(2**20)
    holder = opened(ledger, "a-model-with-a-very-long-name/of-somebody", level=2**20)
    allot(ledger, holder, 1, deadline_s=NOW - 12345)
    lines = list(render(LedgerView(now_s=NOW, gpus=(ledger.view(NOW),))))
    assert max(map(len, lines)) <= 80
    assert any("…" in line for line in lines)


def test_a_gpu_in_trouble_says_so() -> None:
    ledger = ledger_of(8, survivors=Survivors(until_s=NOW + 5))
    ledger.on(GpuSampled(gpu_id=0, strangers_bytes=GIB), NOW)
    text = "\n".join(render(LedgerView(now_s=NOW, gpus=(ledger.view(NOW),))))
    assert "restarted: nothing new is given until the holders have said what they hold" in text
    assert "1008 MiB more is held than there is" in text


def test_a_server_without_gpus_is_not_an_error() -> None:
    assert list(render(LedgerView(now_s=NOW))) == ["no GPU has a ledger yet"]


def test_a_view_survives_the_way_through_json() -> None:
    view = a_view()
    assert read(msgspec.json.encode(view), "url") == view


@pytest.mark.parametrize("body", [b"<html>", b"{}", b'{"version": 1, "now_s": "noon"}', b'{"version": 2, "now_s": 1}', b"\xff"])
def test_what_is_not_a_ledger_is_refused(body: bytes) -> None:
    with pytest.raises(ProtocolError, match="http://there"):
        read(body, "http://there")


@contextmanager
def serving(status: int, body: bytes) -> Iterator[str]:
    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(status if self.path == "/ledger" else 400)
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_: object) -> None:
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_port}"
        finally:
            server.shutdown()
            thread.join()


def test_the_command_reads_a_running_server(capsys: pytest.CaptureFixture[str]) -> None:
    body = msgspec.json.encode(a_view())
    with serving(200, body) as url:
        assert main(["memory", "--url", url + "/"]) == 0
        assert "llama/0                weights" in capsys.readouterr().out
        assert main(["memory", "--url", url, "--json"]) == 0
        assert msgspec.json.decode(capsys.readouterr().out.encode(), type=LedgerView) == a_view()


def test_the_command_says_why_it_cannot(capsys: pytest.CaptureFixture[str]) -> None:
    with serving(404, b"") as url:
        assert main(["memory", "--url", url]) == 1
        assert "answers 404 to GET /ledger" in capsys.readouterr().err
    assert main(["memory", "--url", url]) == 1
    assert "no server answers: " in capsys.readouterr().err
    assert main(["memory", "--url", "localhost:8000"]) == 1
    assert "begins with http://" in capsys.readouterr().err
