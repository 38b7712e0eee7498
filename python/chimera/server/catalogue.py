"""The models that control told of, under every name they have; their tokenizers and SGLang's parsers, read when first needed.

Models that share a vocabulary (eighteen copies of four families, say) share the tokenizer. Knows no HTTP.
"""

from __future__ import annotations

import asyncio
import difflib
import hashlib
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING
from weakref import WeakValueDictionary

from chimera.core.access import ApiKey
from chimera.core.model import ModelSpec
from chimera.core.parsers import AUTO
from chimera.errors import ConfigError, RequestError
from chimera.parsing.tokenizer import ModelTokenizer
from chimera.server.intake import CompletionWish

if TYPE_CHECKING:
    from chimera.parsing.sglang_parsers import SglangHearing

_TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja")


class Catalogue:
    def __init__(self) -> None:
        self.known = False
        """Control has told of all its models once; before that nobody can say that a name is wrong."""
        self._specs: dict[str, ModelSpec] = {}
        self._names: dict[str, ModelSpec] = {}
        self._since_s: dict[str, int] = {}
        self._tokenizers: dict[str, asyncio.Task[ModelTokenizer]] = {}
        self._parsers: asyncio.Task[type[SglangHearing]] | None = None
        self._by_content: WeakValueDictionary[bytes, ModelTokenizer] = WeakValueDictionary()

    @property
    def models(self) -> list[tuple[ModelSpec, int]]:
        """Every model with the time since which it is known here, in seconds of the calendar's clock."""
        return [(spec, self._since_s[name]) for name, spec in self._specs.items()]

    def register(self, spec: ModelSpec) -> None:
        if spec.tool_call_parser or spec.reasoning_parser:
            self._load_parsers()  # they will be needed, and take seconds
        self._specs[spec.name] = spec
        self._since_s.setdefault(spec.name, int(time.time()))
        self._index()

    def remove(self, name: str) -> None:
        if self._specs.pop(name, None) is not None:
            del self._since_s[name]
            self._index()

    def keep_only(self, names: Iterable[str]) -> None:
        """Control has named all it has; what left while it was away is forgotten."""
        self.known = True
        for name in self._specs.keys() - set(names):
            self.remove(name)

    def knows(self, name: str) -> bool:
        return name in self._names

    def resolve(self, name: str | None, key: ApiKey | None = None) -> ModelSpec:
        """The model of this name or alias; of no name, if there is only one. Who asks with a key hears of no more than its."""
        if not self.known:
            raise RequestError(
                "service_unavailable", "the server is starting and does not know its models yet", retry_after_s=1
            )
        known = [spec for spec in self._specs.values() if key is None or key.allows(spec.name)]
        if name is None and len(known) == 1:
            return known[0]
        spec = self._names.get(name) if name is not None else None
        if spec is None:
            raise RequestError("model_not_found", _no_such(name, known), param="model")
        return spec

    async def tokenizer(self, spec: ModelSpec) -> ModelTokenizer:
        """Reading one takes up to a second, so that happens in a thread, once for all who wait."""
        task = self._tokenizers.get(spec.tokenizer_path)
        if task is None:
            task = asyncio.create_task(asyncio.to_thread(self._load, Path(spec.tokenizer_path)))
            self._tokenizers[spec.tokenizer_path] = task
        try:
            return await asyncio.shield(task)  # one client that leaves must not take it from the others
        except (ConfigError, OSError) as fault:
            self._tokenizers.pop(spec.tokenizer_path, None)  # the operator may mend it
            raise RequestError("model_unavailable", f"{spec.name}: {fault}") from None

    async def hearing(
        self, spec: ModelSpec, wish: CompletionWish, tokenizer: ModelTokenizer, prompt_ids: Sequence[int]
    ) -> SglangHearing | None:
        """How the answers to the wish are to be listened to; `None`: their text is what they say."""
        toolbox, reasoning = wish.toolbox, spec.reasoning_parser
        if wish.form is not None or not wish.tells_thoughts:
            reasoning = None  # a form has no room for thoughts
        if toolbox is None and reasoning is None:
            return None
        try:
            hearing = await asyncio.shield(self._load_parsers())
        except ImportError as fault:
            self._parsers = None
            raise RequestError("internal_error", f"SGLang's parsers cannot be imported: {fault}") from None
        tool_parser = spec.tool_call_parser or AUTO
        return hearing(tokenizer, toolbox=toolbox, tool_parser=tool_parser, reasoning_parser=reasoning, prompt_ids=prompt_ids)

    def _load_parsers(self) -> asyncio.Task[type[SglangHearing]]:
        """In a thread, and once: it takes seconds and hundreds of megabytes, so a front-end that needs none has none."""
        if self._parsers is None:
            self._parsers = asyncio.create_task(asyncio.to_thread(_import_hearing))
        return self._parsers

    def _load(self, folder: Path) -> ModelTokenizer:
        digest = _content_digest(folder)
        tokenizer = self._by_content.get(digest)
        if tokenizer is None:
            tokenizer = self._by_content[digest] = ModelTokenizer.load(folder)
        return tokenizer

    def _index(self) -> None:
        """Aliases first: no alias hides a model's own name. Tokenizers that no model uses go."""
        self._names = {alias: spec for spec in self._specs.values() for alias in spec.aliases} | self._specs
        for path in self._tokenizers.keys() - {spec.tokenizer_path for spec in self._specs.values()}:
            del self._tokenizers[path]


def _no_such(name: str | None, known: Iterable[ModelSpec]) -> str:
    if name is None:
        return "model: the request names none, and there is not exactly one to choose"
    names = [one for spec in known for one in (spec.name, *spec.aliases)]
    near = difflib.get_close_matches(name, names, n=1, cutoff=0.5)
    return f"the model {name!r} does not exist here" + (f"; did you mean {near[0]!r}?" if near else "")


def _import_hearing() -> type[SglangHearing]:
    from chimera.parsing.sglang_parsers import SglangHearing

    return SglangHearing


def _content_digest(folder: Path) -> bytes:
    digest = hashlib.blake2b()
    for name in _TOKENIZER_FILES:
        path = folder / name
        digest.update(path.read_bytes() if path.is_file() else b"")
        digest.update(name.encode())
    return digest.digest()
