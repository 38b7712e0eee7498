"""Between SGLang's model objects and weight images: what a loaded model consists of, and how a bare one gets it back.

A model is surveyed right after SGLang's own loader has built it: parameters, buffers, tensor attributes, and the plain
attributes that loading has set. Coming back, the same model is constructed without memory, on torch's meta device, and
everything surveyed is put where it was. Knows modules and tensors; asks no store and runs no step.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from sglang.srt.layers.rotary_embedding.factory import _ROPE_DICT
from sglang.srt.model_executor.model_runner_components import load_model_utils
from sglang.srt.model_loader import loader as loaders
from sglang.srt.model_loader.utils import set_default_torch_dtype

from chimera.core.model import ModelSpec
from chimera.engine.sglang.arguments import server_arguments
from chimera.errors import WeightsError
from chimera.weights.copier import Copier
from chimera.weights.image import Entry, Image, aligned
from chimera.weights.site import Site
from chimera.weights.source import stamps
from chimera.weights.store import ImageKey

PARAMETER, BUFFER, ATTRIBUTE = "parameter", "buffer", "attribute"

_NOT_LAYOUT = (
    "max_total_tokens",
    "max_running_requests",
    "tokenizer_path",
    "log_level",
    "disable_cuda_graph",
    "cuda_graph_max_bs_decode",
)
_FILES_FORMATS = ("auto", "safetensors")
_MORE_THAN_ONE_IMAGE = ("speculative_", "cpu_offload", "offload_", "weight_cache", "custom_weight_loader")
_CAN_BE_MARKED = (torch.float32, torch.bfloat16, torch.float16)
_UNTYPED = (type(None), bool, int, float, str)


def takes_images(model: ModelSpec) -> bool:
    """Whoever asks for another of SGLang's loaders gets it: `dummy` has no files, others bring their own ways. And where
    there is a second model, or weights that wander, one image is not all there is."""
    wandering = any(name.startswith(_MORE_THAN_ONE_IMAGE) and value for name, value in model.engine_args.items())
    return not wandering and model.engine_args.get("load_format", "auto") in _FILES_FORMATS


def key_of(model: ModelSpec, *, engine: str, device: str, rank: int = 0) -> ImageKey:
    folder = Path(model.path)
    try:
        arguments = server_arguments(model, on_cpu=device == "cpu", kv_bytes=None)
        files = stamps(folder)
    except (OSError, ValueError) as fault:
        raise WeightsError(f"the model's folder cannot be read: {fault}") from fault
    settings = {name: value for name, value in arguments.items() if name not in _NOT_LAYOUT}
    return ImageKey(
        folder=str(folder),
        files=files,
        engine=engine,
        device=device,
        settings=json.dumps(settings, sort_keys=True, default=str),
        rank=rank,
        tp_size=model.tp_size,
    )


@dataclass(slots=True, frozen=True, kw_only=True)
class Survey:
    """What a loaded model consists of, and the bytes to copy. Holds its tensors."""

    entries: tuple[Entry, ...]
    pieces: tuple[tuple[int, torch.Tensor], ...]
    data_bytes: int
    plain: dict[str, bool | int | float | str | None]
    absent: tuple[str, ...]


class Witness:
    """Lets SGLang load as it likes, and surveys what came of it."""

    survey: Survey | None = None
    unfit: str = ""
    """Why the model cannot come from an image."""

    def see(self, model: torch.nn.Module, model_config: Any, load_config: Any) -> None:
        _require_filled(model)
        try:
            self.survey = survey(model, skeleton(model_config, load_config))
        except (AttributeError, NotImplementedError, RuntimeError, TypeError, ValueError) as fault:
            # Whatever a model does in its constructor that needs real tensors: it loads as SGLang loads it.
            self.unfit = f"{type(fault).__name__}: {fault}"


@contextmanager
def witnessed(read: Callable[[int], object]) -> Iterator[Witness]:
    """While SGLang loads a model by its own means. `read` hears of each tensor's bytes as it comes from the files."""
    witness = Witness()

    def get_model_loader(load_config: Any, model_config: Any = None) -> Any:
        loader = loaders.get_model_loader(load_config, model_config)
        load, weights = loader.load_model, getattr(loader, "_get_all_weights", None)

        def get_all_weights(*of: Any) -> Iterator[tuple[str, torch.Tensor]]:
            assert weights is not None, "only what is there is replaced"
            for name, tensor in weights(*of):
                read(tensor.nbytes)
                yield name, tensor

        def load_model(*, model_config: Any, device_config: Any) -> torch.nn.Module:
            model: torch.nn.Module = load(model_config=model_config, device_config=device_config)
            witness.see(model, model_config, load_config)
            return model

        loader.load_model = load_model
        if weights is not None:
            loader._get_all_weights = get_all_weights
        return loader

    with _loader_is(get_model_loader), _unfilled_shows():
        yield witness


@contextmanager
def loading_from(image: Image, copier: Copier, site: Site) -> Iterator[None]:
    """While SGLang loads a model: it gets it from the image, which is copied to the site."""

    def get_model_loader(load_config: Any, model_config: Any = None) -> Any:
        return _ImageLoader(load_config, image, copier, site)

    with _loader_is(get_model_loader):
        yield


class _ImageLoader(loaders.BaseModelLoader):  # type: ignore[misc]
    def __init__(self, load_config: Any, image: Image, copier: Copier, site: Site) -> None:
        super().__init__(load_config)
        self._image: Image | None = image
        self._copier = copier
        self._site = site

    def download_model(self, model_config: Any) -> None:
        """Nothing is: the image is here."""

    def load_model(self, *, model_config: Any, device_config: Any) -> torch.nn.Module:
        # SGLang keeps its loader for as long as the model; the image is in use only while somebody keeps it for us.
        image, self._image = self._image, None
        assert image is not None, "a loader loads once"
        # The bytes are on their way while the skeleton is made.
        self._copier.begin(image, self._site)
        try:
            model = skeleton(model_config, self.load_config)
            bind(model, image, self._site.bytes)
        finally:
            self._copier.finish()
        return model.eval()


@contextmanager
def _unfilled_shows() -> Iterator[None]:
    """SGLang loads what the files have and says nothing of what they lack: a config with more heads than the weights leaves
    parts of them as the memory was. What constructors leave empty is marked, so that it can be seen afterwards."""
    initialize = loaders._initialize_model

    def initialize_marked(*settings: Any, **named: Any) -> Any:
        empty = torch.empty

        def marked(*size: Any, **named: Any) -> torch.Tensor:
            tensor: torch.Tensor = empty(*size, **named)
            return tensor if tensor.is_meta or tensor.dtype not in _CAN_BE_MARKED else tensor.fill_(torch.nan)

        torch.empty = marked
        try:
            return initialize(*settings, **named)
        finally:
            torch.empty = empty

    loaders._initialize_model = initialize_marked
    try:
        yield
    finally:
        loaders._initialize_model = initialize


def _require_filled(model: torch.nn.Module) -> None:
    for name, parameter in model.named_parameters():
        if parameter.dtype in _CAN_BE_MARKED and bool(torch.isnan(parameter).any()):
            raise WeightsError(f"the files do not fill {name} {tuple(parameter.shape)}: config.json and weights do not fit")


@contextmanager
def _loader_is(get_model_loader: Any) -> Iterator[None]:
    """SGLang takes a loader's class instead of its name, but only from its own configuration; so its choice is replaced."""
    original = load_model_utils.get_model_loader
    load_model_utils.get_model_loader = get_model_loader
    try:
        yield
    finally:
        load_model_utils.get_model_loader = original


def skeleton(model_config: Any, load_config: Any) -> torch.nn.Module:
    """The model without memory: every tensor has its shape and type, and no bytes."""
    # SGLang shares rotary tables between models of a process. One without bytes would serve the next model, and one over
    # an image would keep that image mapped.
    _ROPE_DICT.clear()
    quant_config = loaders._get_quantization_config(model_config, load_config)
    try:
        with set_default_torch_dtype(model_config.dtype), torch.device("meta"):
            model: torch.nn.Module = loaders._initialize_model(model_config, load_config, quant_config)
    finally:
        _ROPE_DICT.clear()
    return model


def survey(model: torch.nn.Module, bare: torch.nn.Module) -> Survey:
    """Everything of `model` that `bare`, the same model never loaded, does not have by itself."""
    entries: list[Entry] = []
    places: dict[int, int] = {}
    pieces: list[tuple[int, torch.Tensor]] = []
    end = 0
    for name, kind, tensor in _tensors(model):
        storage = tensor.untyped_storage()
        place = places.get(storage.data_ptr()) if storage.nbytes() else 0
        if place is None:
            place = places[storage.data_ptr()] = end
            whole = torch.empty(0, dtype=torch.uint8, device=tensor.device).set_(storage, 0, (storage.nbytes(),), (1,))
            pieces.append((place, whole))
            end = aligned(end + storage.nbytes())
        at = place + tensor.storage_offset() * tensor.element_size()
        dtype = str(tensor.dtype).removeprefix("torch.")
        entries.append(Entry(name, kind, dtype, tuple(tensor.shape), tuple(tensor.stride()), at))
    own = dict(_plain(bare))
    nothing = object()
    loaded = {name for name, kind, _ in _tensors(model) if kind == PARAMETER}
    return Survey(
        entries=tuple(entries),
        pieces=tuple(pieces),
        data_bytes=end,
        plain={name: value for name, value in _plain(model) if own.get(name, nothing) != value},
        absent=tuple(name for name, kind, _ in _tensors(bare) if kind == PARAMETER and name not in loaded),
    )


def bind(model: torch.nn.Module, image: Image, run: torch.Tensor | None) -> None:
    """Puts the image's tensors, over `run` or over its own mapping, and its plain attributes into a skeleton."""
    modules = dict(model.named_modules())
    for name in image.contents.absent:
        owner, leaf = _owner(modules, name)
        owner._parameters.pop(leaf, None)
    for name, value in image.contents.plain.items():
        owner, leaf = _owner(modules, name)
        owner.__dict__[leaf] = value
    for entry, tensor in image.tensors(run):
        owner, leaf = _owner(modules, entry.name)
        match entry.kind:
            case "parameter":
                owner._parameters[leaf] = _parameter(owner._parameters.get(leaf), tensor)
            case "buffer":
                owner._buffers[leaf] = tensor
            case _:
                owner.__dict__[leaf] = tensor
    hollow = next((name for name, _, tensor in _tensors(model) if tensor.is_meta), None)
    if hollow is not None:
        raise WeightsError(f"the image of {image.contents.model} has nothing for {hollow}")


def _owner(modules: dict[str, torch.nn.Module], name: str) -> tuple[torch.nn.Module, str]:
    path, _, leaf = name.rpartition(".")
    if path not in modules:
        raise WeightsError(f"the image has {name}, and the model no such module")
    return modules[path], leaf


def _parameter(bare: torch.nn.Parameter | None, tensor: torch.Tensor) -> torch.nn.Parameter:
    """Of the class, and with the attributes, that the model's constructor gave it."""
    parameter = torch.nn.Parameter(tensor, requires_grad=False)
    if bare is not None:
        parameter.__class__ = bare.__class__
        parameter.__dict__.update(bare.__dict__)
    return parameter


def _tensors(model: torch.nn.Module) -> Iterator[tuple[str, str, torch.Tensor]]:
    """Every tensor that a module of the model holds by name. A module with two paths has its tensors under the first."""
    for path, module in model.named_modules():
        at = f"{path}." if path else ""
        for leaf, parameter in module._parameters.items():
            if parameter is not None:
                yield at + leaf, PARAMETER, parameter.detach()
        for leaf, buffer in module._buffers.items():
            if buffer is not None:
                yield at + leaf, BUFFER, buffer
        for leaf, value in vars(module).items():
            if isinstance(value, torch.Tensor):
                yield at + leaf, ATTRIBUTE, value.detach()


def _plain(model: torch.nn.Module) -> Iterator[tuple[str, bool | int | float | str | None]]:
    for path, module in model.named_modules():
        at = f"{path}." if path else ""
        for leaf, value in vars(module).items():
            if type(value) in _UNTYPED and leaf != "training":
                yield at + leaf, value
