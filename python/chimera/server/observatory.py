"""What can be read of the server: `/metrics`. Knows no prompt and gives no orders; every page is made of what control tells."""

from __future__ import annotations

import asyncio
from pathlib import Path

from aiohttp import web

from chimera.errors import RequestError
from chimera.server import metrics
from chimera.server.relay import Relay
from chimera.server.routes import Route


class Observatory:
    def __init__(self, relay: Relay, records: Path | None = None) -> None:
        self._relay = relay
        self._records = records

    def routes(self) -> list[Route]:
        return [
            Route(
                method="GET",
                path="/metrics",
                what="What the whole server has counted, for Prometheus",
                handler=self._metrics,
                text=metrics.CONTENT_TYPE,
            )
        ]

    async def _metrics(self, http: web.Request) -> web.Response:
        """For the whole server, whichever front-end is asked. `?names=own,vllm,sglang` leaves the others out."""
        families = tuple(http.query.get("names", ",".join(metrics.FAMILIES)).split(","))
        if unknown := set(families) - set(metrics.FAMILIES):
            known = ", ".join(metrics.FAMILIES)
            raise RequestError("bad_request", f"names: {', '.join(sorted(unknown))} is not one of {known}", param="names")
        measures, snapshot = await self._relay.measures()
        # In a thread: with hundreds of models the page is long, and streams do not wait for it.
        text = await asyncio.to_thread(metrics.page, measures, snapshot, families)
        return web.Response(body=text, headers={"Content-Type": metrics.CONTENT_TYPE})
