"""The cached prefixes of a model that is away: the branches of SGLang's tree, and their KV in the host's memory.

Taken down when it leaves, those that were used last first, as far as there is room for them; planted again in a tree that
has none when it is back. Reaches into SGLang's prefix trees; knows no budget.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from sglang.srt.mem_cache.base_prefix_cache import InsertParams

from chimera.kv.pool import ElasticPool


class Branch(NamedTuple):
    """One node, whose tokens follow on its parent's."""

    parent: int
    """Its place among the others, which is before this one's; −1 at the root."""
    key: Any
    slots: torch.Tensor
    used_at: float


@dataclass(frozen=True, slots=True)
class Prefixes:
    branches: tuple[tuple[int, Any, int], ...]
    """Parent, key and length of each."""
    contents: list[torch.Tensor]
    """Their KV, one branch behind the other."""

    @property
    def nbytes(self) -> int:
        return sum(rows.nbytes for rows in self.contents)


def take_down(tree: Any, pool: ElasticPool, most_bytes: int) -> Prefixes | None:
    """Nobody may be using them: no step is in flight, and none will be."""
    known = list(_branches(tree))
    chosen = _dearest(known, most_bytes // pool.slot_bytes)
    if not chosen:
        return None
    place = {old: new for new, old in enumerate(chosen)}
    branches = tuple((place.get(known[i].parent, -1), known[i].key, len(known[i].slots)) for i in chosen)
    return Prefixes(branches, pool.lift(torch.cat([known[i].slots for i in chosen])))


def plant(tree: Any, pool: ElasticPool, prefixes: Prefixes) -> int:
    """Into a tree without branches, as many as there are free slots for; the tokens that are there again."""
    room, planted = pool.slots.available, 0
    keys: list[Any] = []
    rows: list[torch.Tensor] = []
    for parent, own, length in prefixes.branches:
        if planted + length > room:
            break  # what follows may hang on this one
        slots = pool.slots.alloc(length)
        assert slots is not None, "there was room just now"
        pool.lower(slots, [content[planted : planted + length] for content in prefixes.contents])
        before = 0 if parent < 0 else len(keys[parent])
        key = own if parent < 0 else _joined(keys[parent], own)
        row = slots if parent < 0 else torch.cat((rows[parent], slots))
        tree.insert(InsertParams(key=key, value=row, prev_prefix_len=before))
        keys.append(key)
        rows.append(row)
        planted += length
    return planted


def _dearest(branches: Sequence[Branch], most_tokens: int) -> list[int]:
    """Those used last, each with all that it hangs on; in the order of their places."""
    chosen: set[int] = set()
    tokens = 0
    for at in sorted(range(len(branches)), key=lambda i: -branches[i].used_at):
        chain = []
        while at >= 0 and at not in chosen:
            chain.append(at)
            at = branches[at].parent
        length = sum(len(branches[i].slots) for i in chain)
        if tokens + length <= most_tokens:
            chosen.update(chain)
            tokens += length
    return sorted(chosen)


def _branches(tree: Any) -> Iterator[Branch]:
    """Parents first. None of a tree whose nodes have more than one kind of cache, or keys that overlap."""
    core = getattr(tree, "tree_core", tree)
    root = getattr(core, "root_node", None)
    if root is None or len(getattr(tree, "tree_components", ("full",))) > 1:
        return
    unified = hasattr(root, "component_data")
    waiting = [(-1, child) for child in root.children.values()]
    count = 0
    while waiting:
        parent, node = waiting.pop()
        value = node.component_data[0].value if unified else node.value
        if value is None or node.key.is_bigram:
            continue
        yield Branch(parent, node.key, value, node.last_access_time)
        waiting += [(count, child) for child in node.children.values()]
        count += 1


def _joined(first: Any, second: Any) -> Any:
    whole = copy.copy(first)
    whole.token_ids = first.raw_token_ids() + second.raw_token_ids()
    whole.limit = None
    return whole
