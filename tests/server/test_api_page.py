"""`docs/api.md` names every route that is served, and no other."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.server.conftest import Stage

pytestmark = pytest.mark.asyncio(loop_scope="module")
PAGE = Path(__file__).parents[2] / "docs" / "api.md"


def rows(document: dict[str, Any]) -> list[str]:
    """As the page has them, in the order of the document."""
    return [
        f"| {method.upper()} | `{path}` | {told['summary']} | {told['tags'][0]} |"
        for path, operations in document["paths"].items()
        for method, told in operations.items()
    ]


async def test_the_page_is_true_to_what_is_served(standing: Stage) -> None:
    async with standing.client.get(standing.url + "/openapi.json") as response:
        served = rows(await response.json())
    written = [line for line in PAGE.read_text().splitlines() if line.startswith(("| GET", "| POST", "| PUT", "| DELETE"))]
    assert sorted(written) == sorted(served), "the rows that docs/api.md should have:\n" + "\n".join(served)
