"""SGLang with its weights from shared images: built once per host, brought in as views or by one copy, and checked.

The first activation of a model builds its image: SGLang loads it by its own means, says what it answers to a canary
prompt, and is surveyed. Every later one takes the image, and the model serves only if the canary still gets that answer.
Knows the store and SGLang's engine; neither knows the other.
"""

from __future__ import annotations

import importlib.metadata
import json
import logging
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import NamedTuple

import msgspec
import torch

from chimera.core.model import ModelSpec
from chimera.core.shape import shape_of
from chimera.engine.api import NO_PARKING, CannotServe, Holding, Leave, Order, Parking, Post, Remains, Stats, Submission, Vitals
from chimera.engine.sglang.council import Council, place_of
from chimera.engine.sglang.engine import Aside, SglangEngine
from chimera.engine.sglang.images import key_of, loading_from, takes_images, witnessed
from chimera.engine.sglang.prefixes import Prefixes
from chimera.engine.sglang.shelf import Berth, Parked, Shelf
from chimera.errors import WeightsError
from chimera.msg.actions import Place
from chimera.msg.stream import Payload, Sampling, TokenDelta
from chimera.weights.copier import Copier, copier_for
from chimera.weights.image import Canary, Contents, Image
from chimera.weights.site import Site
from chimera.weights.source import require_sound, stamps
from chimera.weights.store import ImageKey, WeightStore

log = logging.getLogger(__name__)

CANARY_TOKENS = 2
"""One by a prefill, one by a decode step: both ways through the model, and little of the time an activation takes."""
_CANARY_PROMPT_LENGTH = 8
_CANARY_ROOM_TOKENS = 512


class WarmEngine:
    """An `Engine`. `store` may be shared with any number of other processes.

    A model that leaves is parked, if its weights came from an image and its cache is elastic: `parking` says how many are.
    """

    def __init__(self, bare: SglangEngine, store: WeightStore, parking: Parking = NO_PARKING) -> None:
        self._bare = bare
        self._store = store
        self._host_kv_bytes = parking.host_kv_bytes
        self._shelf: Shelf[_Kept] = Shelf(parking.models, parking.nbytes, self._discard)
        self._watch: Callable[[str, int], object] = _unwatched
        self._up: _Up | None = None
        """The model that is up, if it may be parked."""
        self._on_cpu = _device_kind() == "cpu"
        self._copier: Copier = copier_for(_device_kind())
        self._engine = f"sglang {importlib.metadata.version('sglang')}, torch {torch.__version__}"

    def watch(self, watch: Callable[[str, int], object]) -> None:
        """From now on `watch` hears what is done with so many more bytes of a model whose image is built."""
        self._watch = watch

    def prepare(self, model: ModelSpec, *, gpu_ids: tuple[int, ...]) -> int:
        """Have the model's image built, if it is not there; an image that is there is read and held against its checksums.

        Returns the bytes of the image, none if the model has no use for one.
        """
        if not self.takes_image(model) or model.tp_size > 1:
            return 0  # the parts of a gang are loaded by a gang
        with _refusing():
            key = self._key(model)
            image = self._store.open(key)
            if image is not None:
                try:
                    image.require_intact()
                except WeightsError as fault:
                    self._store.discard(image, str(fault))
                    image = None
            image = image or self._image(model, gpu_ids)
            return image.contents.data_bytes

    def activate(
        self,
        model: ModelSpec,
        *,
        gpu_ids: tuple[int, ...],
        kv_bytes: int | None,
        ceiling_bytes: int | None = None,
        place: Place | None = None,
    ) -> Vitals:
        vitals, image = self.bring_up(model, gpu_ids=gpu_ids, kv_bytes=kv_bytes, ceiling_bytes=ceiling_bytes, place=place)
        try:
            if image is not None:
                self._require_right(image)
        except CannotServe:
            self._forget_up()
            raise
        if self._up is not None and self._up.prefixes is not None:
            self._bare.plant(self._up.prefixes)
            self._up = self._up._replace(prefixes=None)
        return vitals

    def bring_up(
        self,
        model: ModelSpec,
        *,
        gpu_ids: tuple[int, ...],
        kv_bytes: int | None,
        ceiling_bytes: int | None = None,
        place: Place | None = None,
    ) -> tuple[Vitals, Image | None]:
        """All of an activation but its check; the image that the weights came from, if they came from one."""
        if place is not None:
            return self._bring_up_part(model, gpu_ids, kv_bytes, ceiling_bytes, place)
        image = None
        if self.takes_image(model):
            with _refusing():
                image = self._image(model, gpu_ids)
        if image is None or image.contents.unfit:
            return self._bare.activate(model, gpu_ids=gpu_ids, kv_bytes=kv_bytes, ceiling_bytes=ceiling_bytes), None
        # Copied to where it lay, an image is only right with the layout that it had then.
        made = f"{image.path.name} {hash(image.contents.entries):x}"
        berth = Berth(model=model, image=made, gpu_ids=gpu_ids, ceiling_bytes=ceiling_bytes)
        parked = self._shelf.take(berth)
        if parked is not None and ceiling_bytes is not None:
            return self._return(parked, image, ceiling_bytes if kv_bytes is None else kv_bytes), image
        began_s = time.monotonic()
        with _refusing():
            site = self._site(image, gpu_ids[0])
        self._up = _Up(berth, image, site, 0.0, 0)
        try:
            with _refusing(), loading_from(image, self._copier, site):
                vitals = self._bare.activate(model, gpu_ids=gpu_ids, kv_bytes=kv_bytes, ceiling_bytes=ceiling_bytes)
        except CannotServe:
            self._forget_up()
            raise
        self._up = self._up._replace(build_s=time.monotonic() - began_s)
        return vitals, image

    def _bring_up_part(
        self, model: ModelSpec, gpu_ids: tuple[int, ...], kv_bytes: int | None, ceiling_bytes: int | None, place: Place
    ) -> tuple[Vitals, Image | None]:
        """One rank's part, with all other ranks: they load from their images if each has one, and else all from the files."""
        self._shelf.clear("what is kept has a world of its own, and a gang makes another")
        image = None
        if self.takes_image(model):
            with _refusing():
                image = self._image_of_part(model, gpu_ids, place)
        if image is not None:
            with _refusing():
                site = self._site(image, gpu_ids[place.rank])
            berth = Berth(model=model, image=image.path.name, gpu_ids=gpu_ids, ceiling_bytes=ceiling_bytes)
            self._up = _Up(berth, image, site, 0.0, 0)
        try:
            with _refusing(), nullcontext() if image is None else loading_from(image, self._copier, site):
                vitals = self._bare.activate(
                    model, gpu_ids=gpu_ids, kv_bytes=kv_bytes, ceiling_bytes=ceiling_bytes, place=place_of(place, "up")
                )
        except CannotServe:
            self._forget_up()
            raise
        return vitals, image

    def _return(self, parked: Parked[_Kept], image: Image, kv_bytes: int) -> Vitals:
        """The bytes are on their way to where they lay while the cache gets its memory."""
        aside, site = parked.what
        self._up = _Up(parked.berth, image, site, parked.build_s, parked.nbytes, aside.prefixes)
        aside.prefixes = None
        try:
            with _refusing():
                self._copier.begin(image, site)
        except CannotServe:
            self._up = None
            self._discard(parked.what)
            raise
        try:
            vitals = self._bare.resume(aside, kv_bytes)
        except CannotServe:
            self._copier.finish()
            self._forget_up()
            raise
        self._copier.finish()
        return vitals

    def serve(self, post: Post) -> None:
        self._bare.serve(post)

    def stats(self) -> Stats:
        return self._bare.stats()

    def holding(self) -> Holding | None:
        return self._bare.holding()

    def deactivate(self) -> None:
        if not self._park():
            self._forget_up()

    def _park(self) -> bool:
        if self._up is None or not self._shelf.most:
            return False
        aside = self._bare.set_aside(self._host_kv_bytes)
        if aside is None:
            return False
        self._make_host_room(aside)
        up, self._up = self._up, None
        self._copier.leave(up.site)
        self._shelf.put(Parked(berth=up.berth, what=_Kept(aside, up.site), nbytes=aside.nbytes, build_s=up.build_s))
        return True

    def _make_host_room(self, newest: Aside) -> None:
        """Prefixes of those who have been away longest go."""
        kept = [newest, *(parked.what.aside for parked in reversed(self._shelf.all))]
        left_bytes = self._host_kv_bytes
        for aside in kept:
            left_bytes -= 0 if aside.prefixes is None else aside.prefixes.nbytes
            if left_bytes < 0:
                aside.prefixes = None

    def _forget_up(self) -> None:
        up, self._up = self._up, None
        self._bare.deactivate()
        if up is not None:
            self._close(up.site)

    def _discard(self, kept: _Kept) -> None:
        self._bare.discard(kept.aside)
        self._close(kept.site)

    def _site(self, image: Image, gpu_id: int) -> Site:
        return self._copier.site(image, torch.device("cpu") if self._on_cpu else torch.device("cuda", gpu_id))

    def _close(self, site: Site) -> None:
        """Nobody is left who could touch it."""
        self._copier.leave(site)
        site.close()

    def remains(self, gpu_id: int) -> Remains:
        parked = self._shelf.on(gpu_id)
        models = tuple(dict.fromkeys(p.berth.model.name for p in parked))
        return Remains(models, self._kept_of_up(gpu_id) + sum(p.nbytes for p in parked))

    def let_go(self, gpu_id: int, most_bytes: int, reason: str) -> None:
        self._shelf.trim(most_bytes - self._kept_of_up(gpu_id), reason, gpu_id)

    def _kept_of_up(self, gpu_id: int) -> int:
        return self._up.kept_bytes if self._up is not None and self._up.berth.gpu_ids[0] == gpu_id else 0

    def takes_image(self, model: ModelSpec) -> bool:
        return takes_images(model) and not model.embedding  # which says nothing that could be compared

    def ask(self, prompt: tuple[int, ...], tokens: int = CANARY_TOKENS) -> tuple[int, ...]:
        """What the model that is up says, greedily. For whoever has it to himself: nothing else is served meanwhile.

        Of a gang all ranks ask, and the first hears the answer: the others' is empty, in their images too.
        """
        question = _Question(prompt, tokens)
        try:
            self._bare.serve(question)
        except Leave:
            if question.refusal:
                # Short of memory, most likely: no reason to think ill of the weights.
                raise CannotServe(f"it could not be asked the canary prompt: {question.refusal}", permanent=False) from None
            return tuple(question.said)
        raise AssertionError("serve() ends by being left")

    def _key(self, model: ModelSpec, rank: int = 0) -> ImageKey:
        return key_of(model, engine=self._engine, device=_device_kind(), rank=rank)

    def _require_right(self, image: Image) -> None:
        wrong = self._wrong(image)
        if wrong:
            self._store.discard(image, wrong)
            raise CannotServe(f"{image.contents.model} woke up wrong: {wrong}; its image will be built again", permanent=False)

    def _wrong(self, image: Image) -> str:
        """What is wrong with the model that has come up from the image; nothing, as a rule."""
        canary = image.contents.canary
        said = self.ask(canary.prompt)
        return "" if said == canary.tokens else f"to the canary prompt it says {said} and should say {canary.tokens}"

    def _image(self, model: ModelSpec, gpu_ids: tuple[int, ...]) -> Image:
        key = self._key(model)
        image = self._store.open(key)
        if image is not None:
            return image
        with self._store.turn(key):
            return self._store.open(key) or self._build(key, model, gpu_ids)

    def _image_of_part(self, model: ModelSpec, gpu_ids: tuple[int, ...], place: Place) -> Image | None:
        """This rank's image, if all ranks have theirs in the end: built by all together where one was missing."""
        key, council = self._key(model, place.rank), Council(place, len(gpu_ids))
        image = self._store.open(key)
        words = council.hear_all(_word(image))
        if _MISSING in words:
            # One turn for all ranks, or two gangs could wait for each other.
            with nullcontext() if place.rank else self._store.turn(key):
                image = self._store.open(key)
                words = council.hear_all(_word(image))
                if _MISSING in words and _UNFIT not in words:
                    words = council.hear_all(_word(image := self._build(key, model, gpu_ids, council)))
        return image if set(words) == {_THERE} else None

    def _build(self, key: ImageKey, model: ModelSpec, gpu_ids: tuple[int, ...], council: Council | None = None) -> Image:
        """Load as SGLang loads, ask the canary, copy, and try the copy before anybody relies on it.

        With a council: one rank's part, while all other ranks do the same.
        """
        began_s = time.monotonic()
        if takes_images(model):
            _require_whole(_folder(model))
        room_bytes = model.kv_bytes(_CANARY_ROOM_TOKENS)
        with witnessed(partial(self._watch, "read")) as witness:
            where = None if council is None else council.place_for("built")
            vitals = self._bare.activate(model, gpu_ids=gpu_ids, kv_bytes=room_bytes, place=where)
        try:
            prompt = _canary_prompt(vitals)
            canary = Canary(prompt=prompt, tokens=self.ask(prompt))
            survey = witness.survey
            if stamps(_folder(model)) != key.files:
                raise WeightsError(f"the files of {model.name} changed while they were read", passing=True)
            contents = Contents(key=key.name, model=model.name, data_bytes=0, entries=(), unfit=witness.unfit)
            if survey is not None:
                contents = msgspec.structs.replace(
                    contents,
                    data_bytes=survey.data_bytes,
                    entries=survey.entries,
                    plain=survey.plain,
                    absent=survey.absent,
                    canary=canary,
                    build_s=time.monotonic() - began_s,
                )
            image = self._store.put(key, contents, [] if survey is None else survey.pieces, partial(self._watch, "copied"))
        finally:
            self._bare.deactivate()
        if contents.unfit:
            log.warning("model=%s loads from its files each time reason=%s", model.name, contents.unfit)
        else:
            took_s = time.monotonic() - began_s
            log.info("built image=%s model=%s bytes=%d seconds=%.3f", key.name, model.name, contents.data_bytes, took_s)
        words = [_word(image)] if council is None else council.hear_all(_word(image))
        return image if _UNFIT in words else self._tried(key, image, model, gpu_ids, council)

    def _tried(self, key: ImageKey, image: Image, model: ModelSpec, gpu_ids: tuple[int, ...], council: Council | None) -> Image:
        """A model whose image does not bring it back right loads from its files, now and later; the log says so."""
        with _refusing():
            site = self._site(image, gpu_ids[0 if council is None else council.place.rank])
        try:
            with _refusing(), loading_from(image, self._copier, site):
                where = None if council is None else council.place_for("tried")
                self._bare.activate(model, gpu_ids=gpu_ids, kv_bytes=model.kv_bytes(_CANARY_ROOM_TOKENS), place=where)
            wrong = self._wrong(image)
        except CannotServe as fault:
            if not fault.permanent:
                raise
            wrong = str(fault)
        finally:
            self._bare.deactivate()
            self._close(site)
        if not wrong:
            return image
        log.warning("model=%s loads from its files each time reason=%s", model.name, wrong)
        return self._store.put(key, Contents(key=key.name, model=model.name, data_bytes=0, entries=(), unfit=wrong), [])


def _unwatched(doing: str, nbytes: int) -> None:
    """Nobody looks on."""


_MISSING, _UNFIT, _THERE = "missing", "unfit", "there"


def _word(image: Image | None) -> str:
    """What one rank says of its image."""
    if image is None:
        return _MISSING
    return _UNFIT if image.contents.unfit else _THERE


class _Kept(NamedTuple):
    aside: Aside
    site: Site


class _Up(NamedTuple):
    berth: Berth
    image: Image
    """In use as long as its model is up."""
    site: Site
    build_s: float
    kept_bytes: int
    """What was kept of it while it was away."""
    prefixes: Prefixes | None = None
    """Until it has answered its canary."""


class _Question:
    """A `Post` that asks one thing, and leaves when the engine has nothing more to do."""

    def __init__(self, prompt: tuple[int, ...], tokens: int) -> None:
        sampling = Sampling(max_new_tokens=tokens, temperature=0.0, ignore_eos=True)
        self._orders: list[Order] = [Submission("canary", Payload(input_ids=list(prompt), sampling=sampling))]
        self._over = False
        self.said: list[int] = []
        self.refusal = ""

    def collect(self, wait_s: float | None) -> Sequence[Order]:
        if self._over and wait_s != 0.0:
            raise Leave
        orders, self._orders = self._orders, []
        return orders

    def deliver(self, deltas: list[TokenDelta]) -> None:
        for delta in deltas:
            self.said += delta.token_ids
            self._over |= delta.outcome is not None

    def fail(self, request_id: str, code: str, message: str) -> None:
        self._over = True
        self.refusal = f"{code}: {message}"

    def flushed(self) -> None:
        """Asked for by the last life's agent; the cache is empty by now."""

    def give_back(self, request_id: str, reason: str) -> None:
        self.fail(request_id, "requeue", reason)


class _refusing:
    """What is wrong with weights is a reason why a model cannot serve."""

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: object, fault: BaseException | None, trace: object) -> None:
        if isinstance(fault, WeightsError):
            raise CannotServe(str(fault), permanent=not fault.passing) from fault


def _require_whole(folder: Path) -> None:
    """On a CPU SGLang fills up with zeros what a file is short of, heads for one, and says nothing."""
    elements = require_sound(folder)
    try:
        shape = shape_of(json.loads((folder / "config.json").read_bytes()))
    except (OSError, ValueError):
        return  # SGLang may know more architectures, and says what is wrong with the others
    if shape.quantization is None and elements < shape.parameters:
        what = f"its files have {elements:,} parameters and its config.json describes {shape.parameters:,}"
        raise WeightsError(f"{folder}: {what}")


def _folder(model: ModelSpec) -> Path:
    return Path(model.path)


def _device_kind() -> str:
    """What decides how tensors are laid out: a CPU, or the kind of GPU."""
    if not torch.accelerator.is_available():
        return "cpu"
    major, minor = torch.cuda.get_device_capability()
    return f"cuda {major}.{minor}"


def _canary_prompt(vitals: Vitals) -> tuple[int, ...]:
    length = min(_CANARY_PROMPT_LENGTH, vitals.context_length - CANARY_TOKENS)
    return tuple(3 + 17 * i for i in range(length))
