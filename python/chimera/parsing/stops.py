"""Finds stop strings in text that comes in pieces. Knows no tokens.

Text that may be the beginning of a stop string is held back until it is known not to be one, so nothing of a stop string is
ever shown. The stop string that is complete first ends the text; how the text was cut into pieces makes no difference.
"""

from __future__ import annotations


class StopStrings:
    """The stop strings of one answer, and the end of the text that is not yet known to be free of them."""

    __slots__ = ("_held", "_stops", "matched")

    def __init__(self, stops: tuple[str, ...]) -> None:
        self._stops = stops
        self._held = ""
        self.matched: str | None = None
        """The stop string that ended the text."""

    def feed(self, text: str) -> str:
        """What may be shown now. After a match nothing more may."""
        if self.matched is not None:
            return ""
        text = self._held + text
        found = [(at + len(stop), at, stop) for stop in self._stops if (at := text.find(stop)) >= 0]
        if found:
            _, at, self.matched = min(found)
            self._held = ""
            return text[:at]
        keep = min((_beginning(text, stop) for stop in self._stops), default=len(text))
        self._held = text[keep:]
        return text[:keep]

    def flush(self) -> str:
        """The text has ended: what was held back was no stop string after all."""
        held, self._held = self._held, ""
        return held


def _beginning(text: str, stop: str) -> int:
    """Where the text's end begins to look like `stop`; the text's length if it does not."""
    at = text.find(stop[0], max(0, len(text) - len(stop) + 1))
    while at >= 0:
        if stop.startswith(text[at:]):
            return at
        at = text.find(stop[0], at + 1)
    return len(text)
