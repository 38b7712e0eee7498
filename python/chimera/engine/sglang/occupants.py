"""Who has which slots of SGLang's pool: cached prefixes and live requests, and how to give them other slots.

Reaches into SGLang's prefix trees (`RadixCache` up to 0.5.16, `UnifiedRadixCache` after it) and its requests, whose
tensors name slots. Knows no stripe and no limit.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch


class Row(NamedTuple):
    """A live request's line in SGLang's table of slots."""

    request: Any
    line: int
    length: int


class Occupants:
    """Every holder of slots at one moment between two steps."""

    def __init__(self, scheduler: Any) -> None:
        self._table: torch.Tensor = scheduler.req_to_token_pool.req_to_token
        self._prefixes = list(_cached(scheduler.tree_cache))
        self._rows = [row for request in live_requests(scheduler) if (row := _row(request)) is not None]

    def slots(self) -> torch.Tensor:
        """All that is named anywhere; what several share comes several times."""
        pieces = [prefix.value for prefix in self._prefixes]
        pieces += [self._table[row.line, : row.length].long() for row in self._rows]
        return torch.cat(pieces) if pieces else torch.empty(0, dtype=torch.int64, device=self._table.device)

    def rename(self, new_number: torch.Tensor) -> None:
        """Give every occupant the slots that `new_number` has at its old ones."""
        for prefix in self._prefixes:
            prefix.value = new_number[prefix.value]
        for request, line, length in self._rows:
            self._table[line, :length] = new_number[self._table[line, :length].long()].to(self._table.dtype)
            # What a chunked prefill goes on from, and what a request was admitted with.
            begins_with = getattr(request, "prefix_indices", None)  # later releases look into the table for it
            if isinstance(begins_with, torch.Tensor) and len(begins_with):
                request.prefix_indices = new_number[begins_with.long()].to(begins_with.dtype)


def live_requests(scheduler: Any) -> list[Any]:
    """Requests that have slots now, in whichever of SGLang's hands; the overlapped step's finished ones included."""
    batches = [scheduler.running_batch, scheduler.last_batch, getattr(scheduler, "cur_batch", None)]
    batches += [entry[0] for entry in getattr(scheduler, "result_queue", ())]
    requests = [request for batch in batches if batch is not None for request in batch.reqs]
    if scheduler.chunked_req is not None:
        requests.append(scheduler.chunked_req)
    return list({id(request): request for request in requests}.values())


def _row(request: Any) -> Row | None:
    kv = getattr(request, "kv", None)
    index = getattr(kv, "req_pool_idx", None) if hasattr(kv, "req_pool_idx") else getattr(request, "req_pool_idx", None)
    if kv is None or index is None or not kv.kv_allocated_len:
        return None
    return Row(request, int(index), kv.kv_allocated_len)


def _cached(tree: Any) -> Iterator[Any]:
    """Each node's holder of slots: an object whose `value` is a tensor."""
    core = getattr(tree, "tree_core", tree)
    root = getattr(core, "root_node", None)
    if root is None:
        return  # a cache that keeps nothing
    unified = hasattr(root, "component_data")
    nodes = list(root.children.values())
    while nodes:
        node = nodes.pop()
        nodes.extend(node.children.values())
        holder = node.component_data[0] if unified else node
        if holder.value is not None:
            yield holder
