"""What the keys of a placement file mean together: names that clash, GPUs that are not there, sums that cannot fit.

Each rule looks only at places without a fault, so that one mistake is named once. Reads no file.
"""

from __future__ import annotations

import difflib
import re
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence

from chimera.config.faults import Faults, at_index, shortened
from chimera.config.placement_file import ModelEntry, PlacementEntry, PlacementFile
from chimera.core.gpu import Gpu
from chimera.core.parsers import AUTO, REASONING_PARSERS, TOOL_CALL_PARSERS
from chimera.core.shape import ModelShape
from chimera.units import GB, format_bytes, parse_seconds

RESERVED_NAMES = ("auto",)
_OPTION = re.compile(r"[a-z][a-z0-9_]*")


def keep_alive_s(entry: ModelEntry) -> float | None:
    """Seconds; below zero never. ValueError if it is no duration."""
    if not isinstance(entry.keep_alive, str):
        return entry.keep_alive
    written = entry.keep_alive
    return -parse_seconds(written[1:]) if written.startswith("-") else parse_seconds(written)


def kv_dtype(entry: ModelEntry) -> str:
    return str(entry.engine_args.get("kv_cache_dtype", "auto"))


def pool_bytes(placement: PlacementEntry) -> int | None:
    return None if placement.max_memory_pool_size is None else round(placement.max_memory_pool_size * GB)


class Rules:
    """Every rule over one file. `root` is where its models are listed; no GPUs means that they are not known."""

    def __init__(
        self, file: PlacementFile, root: str, gpus: Sequence[Gpu], shapes: Mapping[int, ModelShape], faults: Faults
    ) -> None:
        self._models = [(at_index(root, index), entry) for index, entry in enumerate(file.models)]
        self._root = root
        self._gpus = {gpu.gpu_id: gpu for gpu in gpus}
        self._shapes = {at_index(root, index): shape for index, shape in shapes.items()}
        self._faults = faults
        self._weight_bytes: dict[str, int] = {}
        """By the place of the model; only what is known and sound."""

    def check(self, *, elastic: bool) -> None:
        if not self._models and not self._faults.spoil(self._root):
            self._faults.add(self._root, "no model is listed")
        self._names_are_distinct()
        for where, entry in self._models:
            self._entry_is_sound(where, entry)
            self._checkpoint_allows(where, entry)
            for at, placement in _placements(where, entry):
                self._gpus_are_there(at, where, entry, placement)
            self._weights_fit_somewhere(where, entry)
        if not elastic:
            self._static_sums_fit()

    def _names_are_distinct(self) -> None:
        taken: dict[str, str] = {}
        for where, entry in self._models:
            names = [(f"{where}.model_name", entry.model_name)]
            names += [(at_index(f"{where}.aliases", index), alias) for index, alias in enumerate(entry.aliases)]
            for at, name in names:
                if self._faults.spoil(at):
                    continue
                if name in RESERVED_NAMES:
                    self._faults.add(at, f"{name!r} has a meaning of its own", "it lets the server choose a model")
                elif name in taken:
                    self._faults.add(at, f"{shortened(name)!r} is already the name at {taken[name]}")
                else:
                    taken[name] = at

    def _entry_is_sound(self, where: str, entry: ModelEntry) -> None:
        if not self._faults.spoil(f"{where}.keep_alive"):
            self._ask(f"{where}.keep_alive", lambda: keep_alive_s(entry))
        self._parser_is_known(f"{where}.tool_call_parser", entry.tool_call_parser, TOOL_CALL_PARSERS)
        self._parser_is_known(f"{where}.reasoning_parser", entry.reasoning_parser, REASONING_PARSERS)
        for option in entry.engine_args:
            at = f"{where}.engine_args"
            if option in ModelEntry.__struct_fields__:
                self._faults.add(at, f"{option} belongs to the model's entry", "move it one level up")
            elif not _OPTION.fullmatch(option):
                spelt = option.strip("-").replace("-", "_").lower()
                hint = f"write {spelt}" if _OPTION.fullmatch(spelt) else ""
                self._faults.add(at, f"{shortened(option)!r} is not spelt like an option", hint)

    def _parser_is_known(self, where: str, name: str | None, known: frozenset[str]) -> None:
        if name is not None and name not in known | {AUTO} and not self._faults.spoil(where):
            near = difflib.get_close_matches(name, known, n=1)
            self._faults.add(where, f"{shortened(name)!r} is no parser of SGLang's", f"did you mean {near[0]}?" if near else "")

    def _checkpoint_allows(self, where: str, entry: ModelEntry) -> None:
        shape = self._shapes.get(where)
        if shape is None:
            return
        if not self._faults.spoil(f"{where}.tp_size"):
            self._ask(f"{where}.tp_size", lambda: shape.require_divisible(entry.tp_size))
        if entry.context_length is not None and entry.context_length > shape.context_length:
            self._faults.add(f"{where}.context_length", f"{entry.context_length} exceeds the model's {shape.context_length}")
        self._ask(f"{where}.engine_args.kv_cache_dtype", lambda: shape.kv_bytes_per_token(1, kv_dtype(entry)))
        self._ask(f"{where}.quantization", lambda: shape.weight_bytes(1, entry.dtype, entry.quantization))
        if not any(self._faults.spoil(f"{where}.{key}") for key in ("tp_size", "dtype", "quantization")):
            self._weight_bytes[where] = shape.weight_bytes(entry.tp_size, entry.dtype, entry.quantization)

    def _ask(self, where: str, question: Callable[[], object]) -> None:
        try:
            question()
        except ValueError as reason:
            self._faults.add(where, str(reason))

    def _gpus_are_there(self, at: str, where: str, entry: ModelEntry, placement: PlacementEntry) -> None:
        gpu_ids, at_gpus = placement.gpu_ids, f"{at}.gpu_ids"
        if self._faults.spoil(at_gpus):
            return
        if not self._faults.spoil(f"{where}.tp_size") and len(gpu_ids) != entry.tp_size:
            self._faults.add(at_gpus, f"names {len(gpu_ids)} GPUs, but tp_size is {entry.tp_size}")
        if len(set(gpu_ids)) < len(gpu_ids):
            self._faults.add(at_gpus, "names a GPU twice")
        if not self._gpus:
            return
        for index, gpu_id in enumerate(gpu_ids):
            if gpu_id not in self._gpus:
                self._faults.add(at_index(at_gpus, index), f"there is no GPU {gpu_id}", f"there are {self._known_gpus()}")
        seats = [self._gpus[gpu_id] for gpu_id in gpu_ids if gpu_id in self._gpus]
        if len({gpu.node for gpu in seats}) > 1:
            self._faults.add(at_gpus, "names GPUs of several machines", "the ranks of a model share one machine")
        small = next((gpu for gpu in seats if self._weight_bytes.get(where, 0) > gpu.capacity_bytes), None)
        if small is not None:
            self._faults.add(
                at_gpus,
                f"weights of {format_bytes(self._weight_bytes[where])} per GPU do not fit on GPU {small.gpu_id}"
                f" with {format_bytes(small.capacity_bytes)}",
            )

    def _known_gpus(self) -> str:
        known = sorted(self._gpus)
        contiguous = len(known) > 1 and known == list(range(known[0], known[-1] + 1))
        return f"{known[0]} to {known[-1]}" if contiguous else ", ".join(map(str, known[:16]))

    def _weights_fit_somewhere(self, where: str, entry: ModelEntry) -> None:
        """For a model whose place the policy chooses."""
        if entry.init_placements or not self._gpus or any(map(self._faults.spoil, (f"{where}.init_placements", where))):
            return
        weight_bytes = self._weight_bytes.get(where, 0)
        roomy = sum(gpu.capacity_bytes >= weight_bytes for gpu in self._gpus.values())
        if roomy < entry.tp_size:
            need = f"{entry.tp_size} GPUs of {format_bytes(weight_bytes)}" if weight_bytes else f"{entry.tp_size} GPUs"
            self._faults.add(f"{where}.tp_size", f"the model needs {need}, and there are {roomy}")

    def _static_sums_fit(self) -> None:
        """Weights and reserved pools of all that is on; a pool without a size takes what is left."""
        asked: dict[int, int] = defaultdict(int)
        full: set[int] = set()
        for where, entry in self._models:
            for at, placement in _placements(where, entry):
                if not placement.on or self._faults.spoil(at) or self._faults.spoil(f"{where}.tp_size"):
                    continue
                for gpu_id in placement.gpu_ids:
                    asked[gpu_id] += self._weight_bytes.get(where, 0) + (pool_bytes(placement) or 0)
                    gpu = self._gpus.get(gpu_id)
                    if gpu is not None and asked[gpu_id] > gpu.capacity_bytes and gpu_id not in full:
                        full.add(gpu_id)
                        self._faults.add(
                            at,
                            f"weights and pools up to here ask for {format_bytes(asked[gpu_id])} of GPU {gpu_id},"
                            f" which has {format_bytes(gpu.capacity_bytes)}",
                            "lower max_memory_pool_size, turn entries off, or share elastically",
                        )


def _placements(where: str, entry: ModelEntry) -> Iterator[tuple[str, PlacementEntry]]:
    for index, placement in enumerate(entry.init_placements):
        yield at_index(f"{where}.init_placements", index), placement
