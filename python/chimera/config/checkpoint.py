"""Finds a model: a folder, or a hub id in the local cache, or on the hub. Reads its config.json and sees that weights
and tokenizer are there. Reads no weights.

Only `download` touches the network, and it gives up within seconds where there is none.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import msgspec

from chimera.config.faults import Faults, nearest
from chimera.core.model import Tastes
from chimera.core.shape import ModelShape, shape_of
from chimera.errors import ConfigError
from chimera.units import MIB

REACH_HUB_S = 5.0
LARGEST_INDEX_BYTES = 64 * MIB
_HUB_ID = re.compile(r"(?!.*(?:--|\.\.))(?:[A-Za-z0-9_][\w.-]{0,95}/)?[A-Za-z0-9_][\w.-]{0,95}(?<![-.])", re.ASCII)
TOKENIZERS = ("tokenizer.json", "tokenizer.model", "vocab.json", "tekken.json")
_WEIGHTS = ["*.safetensors"]
_WANTED = ["*.json", "*.safetensors", "*.model", "*.txt", "*.jinja"]
# Second copies of the weights in their authors' own formats.
_UNWANTED = ["original/*", "metal/*", "onnx/*"]


class _Generation(msgspec.Struct, frozen=True):
    """What SGLang heeds of generation_config.json, with the bounds that a request's own words have."""

    temperature: Annotated[float, msgspec.Meta(ge=0)] | None = None
    top_p: Annotated[float, msgspec.Meta(gt=0, le=1)] | None = None
    top_k: Annotated[int, msgspec.Meta(ge=-1, le=2**31 - 1)] | None = None
    min_p: Annotated[float, msgspec.Meta(ge=0, le=1)] | None = None
    repetition_penalty: Annotated[float, msgspec.Meta(gt=0, le=2)] | None = None


class Checkpoint(msgspec.Struct, frozen=True, kw_only=True):
    """A folder that holds a model."""

    folder: Path
    shape: ModelShape
    tastes: Tastes = Tastes()


def locate(name: str, roots: Sequence[Path], *, weights: bool = True) -> Path | None:
    """The folder meant by a `model_path`: relative to the first root that has it, else in the hub's local cache.

    None: a hub id that is not on this machine. ConfigError: it can be neither a folder nor a hub id.
    """
    written = os.path.expanduser(name)
    for root in roots:
        if os.path.isfile(os.path.join(root, written)):
            raise ConfigError.single(
                "", f"{name!r} is a file, and neither a placement file (.json, .yaml) nor a model's folder"
            )
    for root in roots:
        folder = os.path.join(root, written)
        if os.path.isdir(folder):
            return Path(os.path.normpath(folder))
    if not _HUB_ID.fullmatch(name):
        raise ConfigError.single("", f"no folder {name!r}", hint=_neighbour(written, roots))
    return _in_cache(name, weights=weights)


def read_checkpoint(folder: Path, *, weights: bool = True) -> Checkpoint:
    """ConfigError lists everything that keeps the folder from being loaded. Its tokenizer may lie elsewhere."""
    faults = Faults(str(folder))
    shape, tastes = _shape(folder, faults), _tastes(folder, faults)
    if weights and (missing := _missing_weights(folder)):
        faults.add("", f"{folder.name}: {missing}")
    faults.require_none()
    assert shape is not None, "a shape, or a fault that says why not"
    return Checkpoint(folder=folder, shape=shape, tastes=tastes)


def missing_tokenizer(folder: Path) -> str:
    """What is wrong, or nothing."""
    if any(os.path.isfile(folder / name) for name in TOKENIZERS):
        return ""
    return f"no tokenizer ({', '.join(TOKENIZERS)})"


def download(hub_id: str, *, weights: bool = True, endpoint: str | None = None, cache: Path | None = None) -> Path:
    """Fetches a model into the hub's local cache, with progress on stderr; ConfigError where that cannot be.

    Without `weights`, what says how large it is and how it reads, which is a thousandth of it.
    """
    import httpx
    import huggingface_hub
    from huggingface_hub import errors

    try:
        # The hub's own client waits for ever; this first question finds out in seconds whether anyone answers.
        huggingface_hub.HfApi(endpoint=endpoint).model_info(hub_id, timeout=REACH_HUB_S)
        folder = huggingface_hub.snapshot_download(
            hub_id,
            endpoint=endpoint,
            cache_dir=cache,
            etag_timeout=REACH_HUB_S,
            allow_patterns=_WANTED,
            ignore_patterns=_UNWANTED if weights else [*_UNWANTED, *_WEIGHTS],
        )
    except errors.GatedRepoError:
        hint = "accept its licence on its page at the hub, then set HF_TOKEN"
        raise ConfigError.single("", f"{hub_id} may not be downloaded yet", hint=hint) from None
    except errors.RepositoryNotFoundError:
        hint = "check the name; a private model needs HF_TOKEN"
        raise ConfigError.single("", f"the hub knows no model {hub_id}", hint=hint) from None
    except (httpx.HTTPError, errors.OfflineModeIsEnabled, errors.EntryNotFoundError, OSError) as reason:
        hint = "fetch it where there is a network (hf download), or give a folder"
        detail = " ".join(str(reason).split())[:200] or type(reason).__name__
        what = f"{hub_id} is no folder, not in the hub's local cache, and cannot be downloaded: {detail}"
        raise ConfigError.single("", what, hint=hint) from None
    return Path(folder)


def _in_cache(hub_id: str, *, weights: bool) -> Path | None:
    """The newest downloaded revision, if it is complete."""
    # Half a second to import, and files that name only folders never need it.
    from huggingface_hub import try_to_load_from_cache

    for file in ("config.json", "tokenizer.json"):
        cached = try_to_load_from_cache(hub_id, file)
        if isinstance(cached, str):
            folder = Path(cached).parent
            complete = not missing_tokenizer(folder) and not (weights and _missing_weights(folder))
            return folder if complete else None
    return None


def _neighbour(written: str, roots: Sequence[Path]) -> str:
    for root in roots:
        parent, wanted = os.path.split(os.path.join(root, written).rstrip("/"))
        try:
            siblings = [entry.name for entry in os.scandir(parent or ".") if entry.is_dir()]
        except OSError:  # no such folder either, or not ours to read: a hint is not worth a fault
            continue
        return nearest(wanted, siblings)
    return ""


def _shape(folder: Path, faults: Faults) -> ModelShape | None:
    try:
        return shape_of(_json_object(folder / "config.json"))
    except FileNotFoundError:
        faults.add("", f"{folder.name}: no config.json, so it is not a model's folder")
    except (OSError, ValueError, RecursionError) as reason:
        faults.add("", f"{folder.name}/config.json: {reason}")
    return None


def _tastes(folder: Path, faults: Faults) -> Tastes:
    """What generation_config.json says of picking; many checkpoints have none."""
    try:
        told = msgspec.convert(_json_object(folder / "generation_config.json"), type=_Generation)
        return Tastes(**msgspec.structs.asdict(told))
    except FileNotFoundError:
        pass
    except (OSError, ValueError, RecursionError) as reason:  # a value out of its bounds is a ValueError too
        faults.add("", f"{folder.name}/generation_config.json: {reason}")
    return Tastes()


def _missing_weights(folder: Path) -> str:
    index = folder / "model.safetensors.index.json"
    if os.path.isfile(index):
        try:
            parts = _json_object(index).get("weight_map")
        except (OSError, ValueError, RecursionError) as reason:
            return f"{index.name}: {reason}"
        if not isinstance(parts, dict) or not all(isinstance(part, str) for part in parts.values()):
            return f"{index.name} has no weight_map"
        absent = sorted(part for part in set(parts.values()) if not os.path.isfile(folder / part))
        return f"{len(absent)} files of weights are missing, first {absent[0]}" if absent else ""
    if any(folder.glob("*.safetensors")):
        return ""
    others = any(folder.glob("*.bin")) or any(folder.glob("*.gguf"))
    return "no weights as *.safetensors" + (", the only format that is read" if others else "")


def _json_object(path: Path) -> dict[str, Any]:
    if path.stat().st_size > LARGEST_INDEX_BYTES:
        raise ValueError("is too large to be what its name says")
    value = json.loads(path.read_bytes())
    if not isinstance(value, dict):
        raise ValueError("is not a JSON object")
    return value
