"""The questions that only a GPU can answer, a module each. Its docstring says what the answer decides; `answer()` finds it out.

A question knows its device, its `Answer` and whether it is rehearsed; it knows nothing of the others, nor of how it is bounded.
"""

from __future__ import annotations

import ast
import importlib.util
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True, slots=True, kw_only=True)
class Question:
    number: int
    title: str
    module: str
    limit_s: float
    """When it is cut. 2–5 and 7 fit into one command of ten minutes; 1, 6 and 8 into another, unless each needs all it may."""

    @property
    def decides(self) -> str:
        """What hangs on the answer, in the words of its module. Read, not imported: who asks needs no torch."""
        found = importlib.util.find_spec(self.module)
        if found is None or found.origin is None:
            raise ModuleNotFoundError(self.module)
        return ast.get_docstring(ast.parse(Path(found.origin).read_text())) or ""


def _question(number: int, module: str, title: str, limit_s: float) -> Question:
    return Question(number=number, title=title, module=f"{__name__}.{module}", limit_s=limit_s)


QUESTIONS = (
    _question(1, "serving", "does stock SGLang serve an 8B with the cut-down kernels", 300),
    _question(2, "handles", "what creating, mapping and unmapping physical memory costs", 90),
    _question(3, "ranges", "which tensors live over a partly mapped range, and how fast", 75),
    _question(4, "layouts", "what strided reads of an interleaved pool cost", 120),
    _question(5, "uploads", "how fast weights reach the device", 150),
    _question(6, "footprint", "what a process costs before it has a model", 140),
    _question(7, "forks", "whether a forked child gets a working device", 110),
    _question(8, "neighbours", "what two decoding engines do to each other", 150),
)
