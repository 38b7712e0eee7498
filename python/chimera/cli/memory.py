"""`chimera memory`: who holds how much of each GPU, as the running server's ledgers have it."""

from __future__ import annotations

import argparse
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator

import msgspec

from chimera.core.gpu import Gpu
from chimera.core.lease import LeaseClass
from chimera.core.ledger_view import LEDGER_VIEW_VERSION, Entry, GpuLedgerView, LedgerView
from chimera.errors import ConfigError, ProtocolError
from chimera.units import format_bytes

_BAR_COLUMNS = 46
_NAME_COLUMNS = 22
_TIMEOUT_S = 5.0
_HOME_AND_CLEAR = "\x1b[H\x1b[J"


def configure(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--url", default="http://127.0.0.1:8000", help="where the server is (default: %(default)s)")
    parser.add_argument("--watch", action="store_true", help="show it again every second, until Ctrl-C")
    parser.add_argument("--json", action="store_true", help="as the server tells it, for programs")


def run(arguments: argparse.Namespace) -> int:
    try:
        while True:
            view = fetch(arguments.url)
            if arguments.json:
                text = msgspec.json.encode(view).decode()
            else:
                text = "\n".join(render(view, block=_block(sys.stdout.encoding)))
            redraw = arguments.watch and not arguments.json and sys.stdout.isatty()
            print(f"{_HOME_AND_CLEAR}{text}" if redraw else text, flush=True)
            if not arguments.watch:
                return 0
            time.sleep(1.0)
    except KeyboardInterrupt:
        return 0


def fetch(url: str) -> LedgerView:
    """The ledger of the server at `url`."""
    if not url.startswith(("http://", "https://")):
        raise ConfigError.single("--url", f"{url!r} is not an address", hint="it begins with http://")
    try:
        with urllib.request.urlopen(f"{url.rstrip('/')}/ledger", timeout=_TIMEOUT_S) as answer:
            body = answer.read()
    except urllib.error.HTTPError as fault:
        fault.close()
        raise ConfigError.single(url, f"answers {fault.code} to GET /ledger", hint="is it a chimera server?") from None
    except OSError as fault:
        reason = getattr(fault, "reason", fault)
        raise ConfigError.single(
            url, f"no server answers: {reason}", hint="start one with chimera serve, or give --url"
        ) from None
    return read(body, url)


def read(body: bytes, url: str) -> LedgerView:
    try:
        version = msgspec.json.decode(body, type=_Versioned).version
        if version > LEDGER_VIEW_VERSION:
            raise ProtocolError(f"{url} tells its ledger in version {version}, this command reads up to {LEDGER_VIEW_VERSION}")
        return msgspec.json.decode(body, type=LedgerView)
    except (msgspec.DecodeError, UnicodeDecodeError) as fault:
        raise ProtocolError(f"{url} does not answer with a ledger: {fault}") from None


class _Versioned(msgspec.Struct):
    version: int


def render(view: LedgerView, *, block: str = "█") -> Iterator[str]:
    """The lines of the table, 80 columns wide."""
    if not view.gpus:
        yield "no GPU has a ledger yet"
    for number, of_gpu in enumerate(view.gpus):
        if number:
            yield ""
        yield from _gpu(of_gpu, block)


def _gpu(view: GpuLedgerView, block: str) -> Iterator[str]:
    gpu = view.gpu
    title = _cut(f"GPU {gpu.gpu_id}  {gpu.name} ({gpu.node})", 44)
    room = f"{_size(gpu, view.free)} free of {format_bytes(gpu.capacity_bytes)}"
    yield f"{title:<44}{room:>36}"
    if view.learning:
        yield "  restarted: nothing new is given until the holders have said what they hold"
    if view.short:
        yield f"  {_size(gpu, view.short)} more is held than there is"
    for lease_class, pages in view.by_class().items():
        yield _bar(gpu, lease_class, pages, block)
    holders = [entry for entry in view.entries if entry.lease.holder]
    if holders:
        yield f"  {'HOLDER':<{_NAME_COLUMNS}} {'CLASS':<9} {'LEVEL':>9} {'HELD':>9} {'WANTED':>9}"
    for entry in sorted(holders, key=_place):
        yield _line(gpu, entry)


def _bar(gpu: Gpu, lease_class: LeaseClass, pages: int, block: str) -> str:
    share = pages / max(1, gpu.pages)
    columns = min(_BAR_COLUMNS, max(1, round(share * _BAR_COLUMNS)))
    return f"  {lease_class:<9} {_size(gpu, pages):>9} {min(share, 9.99):>6.0%}   {block * columns}"


def _line(gpu: Gpu, entry: Entry) -> str:
    lease = entry.lease
    name = _cut(lease.holder, _NAME_COLUMNS)
    sizes = " ".join(f"{_size(gpu, pages):>9}" for pages in (lease.level, lease.held, entry.wanted))
    return f"  {name:<{_NAME_COLUMNS}} {lease.lease_class:<9} {sizes}  {_state(entry)}".rstrip()


def _state(entry: Entry) -> str:
    """In at most 15 columns; a settled lease has nothing to say."""
    if entry.overdue_s > 0:
        return f"late {min(entry.overdue_s, 99999.9):.1f} s"
    if entry.lease.level < entry.lease.held:
        return "recalled"
    if entry.lease.level < entry.allotted:
        return "waits for more"
    return "" if entry.lease.settled else "granted"


def _place(entry: Entry) -> tuple[str, str, int]:
    return entry.lease.holder, str(entry.epoch or ""), list(LeaseClass).index(entry.lease.lease_class)


def _size(gpu: Gpu, pages: int) -> str:
    return format_bytes(pages * gpu.page_bytes)


def _cut(text: str, columns: int) -> str:
    return text if len(text) <= columns else text[: columns - 1] + "…"


def _block(encoding: str | None) -> str:
    """A terminal that cannot show a block gets a hash."""
    try:
        "█".encode(encoding or "ascii")
    except UnicodeEncodeError:
        return "#"
    return "█"
