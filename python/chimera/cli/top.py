"""`chimera top`: the dashboard in a terminal of 80 × 24 or more. Draws what `/sight` streams; keeps nothing of its own."""

from __future__ import annotations

import argparse
import contextlib
import http.client
import shutil
import sys
import time
from collections.abc import Iterator

import msgspec

from chimera.cli.panorama import Panorama, painted, plain, rendered
from chimera.cli.server_url import DEFAULT_URL, ServerError, request
from chimera.core.sight import Past, Sight

_SILENCE_S = 6.0
"""A stream that says nothing for so long has ended without a word."""
_AGAIN_S = 1.0
_OTHER_SCREEN, _OWN_SCREEN = "\x1b[?1049h\x1b[?25l", "\x1b[?25h\x1b[?1049l"
_HOME, _REST_OF_LINE, _REST_OF_SCREEN = "\x1b[H", "\x1b[K", "\x1b[J"


class _Event(msgspec.Struct):
    of: str
    why: str = ""


def configure(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--url", default=DEFAULT_URL, help="where the server is (default: %(default)s)")
    parser.add_argument("--once", action="store_true", help="one picture, and no more (where there is no terminal: always)")


def run(arguments: argparse.Namespace) -> int:
    view = Panorama()
    if arguments.once or not sys.stdout.isatty():
        next(_seconds(arguments.url, view), None)
        if view.sight is None:
            raise ServerError(view.away or f"the server at {arguments.url} shows nothing")
        print("\n".join(plain(line) for line in rendered(view, *_size())))
        return 0
    with _screen():
        while True:
            try:
                for _ in _seconds(arguments.url, view):
                    _draw(view)
            except ServerError as fault:
                if not view.cast.number:
                    raise
                view.away = str(fault)
                _draw(view)
            time.sleep(_AGAIN_S)


def _seconds(url: str, view: Panorama) -> Iterator[None]:
    """Has the view see one sight after the other, until the stream ends."""
    with request(url, "GET", "/sight", within_s=_SILENCE_S) as response:
        try:
            for line in response:
                if not line.startswith(b"data: "):
                    continue
                event = msgspec.json.decode(line[6:], type=_Event)
                if event.of == "away":
                    view.away = event.why
                elif event.of != "sight":
                    continue
                elif not view.see(sight := msgspec.json.decode(line[6:], type=Sight)):
                    view.look_back(_past(url))
                    view.see(sight)
                yield
        except (OSError, http.client.HTTPException) as fault:
            raise ServerError(f"the server at {url} broke the connection: {fault!r}") from None
        except msgspec.DecodeError as fault:
            raise ServerError(f"{url} shows itself as another release does: {fault}") from None


def _past(url: str) -> Past:
    with request(url, "GET", "/sight/past", within_s=_SILENCE_S) as response:
        return msgspec.json.decode(response.read(), type=Past)


def _size() -> tuple[int, int]:
    columns, lines = shutil.get_terminal_size((80, 24))
    return max(80, columns), max(24, lines)


def _draw(view: Panorama) -> None:
    lines = [painted(line) + _REST_OF_LINE for line in rendered(view, *_size())]
    sys.stdout.write(_HOME + "\r\n".join(lines) + _REST_OF_SCREEN)
    sys.stdout.flush()


@contextlib.contextmanager
def _screen() -> Iterator[None]:
    """A screen of its own, and afterwards the old one as it was."""
    sys.stdout.write(_OTHER_SCREEN)
    try:
        yield
    except KeyboardInterrupt:
        return
    finally:
        sys.stdout.write(_OWN_SCREEN)
        sys.stdout.flush()
