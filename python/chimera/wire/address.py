"""Where a peer listens, and how much it may leave unread. Knows no socket."""

from __future__ import annotations

from pathlib import Path

Address = str | Path | tuple[str, int]
"""The path of a Unix socket, or a TCP host and port."""

MAX_UNSENT_BYTES = 64 << 20
"""A peer that lets more than this pile up has stopped working; it is cut off rather than waited for."""
