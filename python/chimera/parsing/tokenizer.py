"""One model's tokenizer and chat template, read from its folder. Knows no request and no HTTP.

Uses the `tokenizers` library alone: it reads every `tokenizer.json` in a fraction of the time and memory that importing
transformers costs.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer, decoders

from chimera.errors import ConfigError, RequestError
from chimera.parsing.chat_template import ChatTemplate
from chimera.parsing.detokenizer import ByteDetokenizer, Detokenizer, TokenBytes, WindowDetokenizer
from chimera.parsing.tools import Toolbox

_SPECIAL_TOKENS = ("bos_token", "eos_token", "unk_token", "pad_token", "sep_token", "cls_token", "mask_token")


class ModelTokenizer:
    """Prompt to tokens, tokens to text."""

    def __init__(self, tokenizer: Tokenizer, template: ChatTemplate | None = None) -> None:
        # Some folders ship with the truncation that training used; a prompt is never cut in silence.
        tokenizer.no_truncation()
        tokenizer.no_padding()
        self._tokenizer = tokenizer
        self._template = template
        self._token_bytes = TokenBytes(tokenizer) if isinstance(tokenizer.decoder, decoders.ByteLevel) else None
        self._special_bytes: TokenBytes | None = None
        """With the special tokens, once somebody needs them."""
        self.vocabulary_size: int = tokenizer.get_vocab_size()

    @classmethod
    def load(cls, folder: str | Path) -> ModelTokenizer:
        """From a model folder. ConfigError when it has no tokenizer that can be read. Takes as long as the file is long."""
        folder = Path(folder)
        path = folder / "tokenizer.json"
        if not path.is_file():
            raise ConfigError.single(
                str(folder), "has no tokenizer.json", hint="convert the tokenizer with transformers' save_pretrained"
            )
        try:
            tokenizer = Tokenizer.from_file(str(path))
        except Exception as fault:  # noqa: BLE001 - the library raises plain Exception, whatever is wrong
            raise ConfigError.single(str(path), f"is no tokenizer: {fault}") from None
        settings = _read_json(folder / "tokenizer_config.json")
        source = _template_source(folder, settings)
        if source is None:
            return cls(tokenizer)
        special = _special_tokens({**_read_json(folder / "special_tokens_map.json"), **settings})
        return cls(tokenizer, ChatTemplate(source, special, path=str(folder)))

    def encode(self, text: str) -> list[int]:
        """A plain prompt, with the tokens that the model expects around every text."""
        return self._encode(text, add_special_tokens=True)

    def encode_chat(
        self,
        messages: Sequence[Mapping[str, Any]],
        extra: Mapping[str, Any] | None = None,
        toolbox: Toolbox | None = None,
    ) -> list[int]:
        """A chat, up to where the assistant begins to speak. The template writes its special tokens itself."""
        if self._template is None:
            raise RequestError(
                "bad_request", "the model has no chat template; it can only complete plain prompts", param="messages"
            )
        tools = None if toolbox is None else [tool.plain() for tool in toolbox.tools]
        return self._encode(self._template.render(messages, extra, tools), add_special_tokens=False)

    @property
    def template_source(self) -> str | None:
        """The chat template as it is written."""
        return None if self._template is None else self._template.source

    @property
    def vocabulary(self) -> set[str]:
        return set(self._tokenizer.get_vocab())

    @property
    def special_tokens(self) -> set[str]:
        return {token.content for token in self._tokenizer.get_added_tokens_decoder().values() if token.special}

    def decode(self, token_ids: Sequence[int]) -> str:
        """With special tokens as they are written."""
        return str(self._tokenizer.decode(list(token_ids), skip_special_tokens=False))

    def spell(self, token_id: int) -> bytes:
        """One token by itself, a special one too: maybe only a part of a character."""
        spelled = b"" if self._token_bytes is None else self._token_bytes[token_id]
        if not spelled:
            spelled = str(self._tokenizer.decode([token_id], skip_special_tokens=False)).encode()
        return spelled

    def detokenizer(self, prompt_ids: Sequence[int], *, special: bool = False) -> Detokenizer:
        """For the answer to this prompt; special tokens are left out, or spelled as they are written."""
        if self._token_bytes is None:
            return WindowDetokenizer(self._tokenizer, prompt_ids, special=special)
        if special and self._special_bytes is None:
            self._special_bytes = TokenBytes(self._tokenizer, special=True)
        return ByteDetokenizer(self._special_bytes if special and self._special_bytes is not None else self._token_bytes)

    def _encode(self, text: str, *, add_special_tokens: bool) -> list[int]:
        # A batch of one: unlike `encode`, it lets other threads run meanwhile.
        ids: list[int] = self._tokenizer.encode_batch_fast([text], add_special_tokens=add_special_tokens)[0].ids
        return ids


def _read_json(path: Path) -> dict[str, Any]:
    try:
        document = json.loads(path.read_bytes())
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as fault:
        raise ConfigError.single(str(path), f"cannot be read: {fault}") from None
    if not isinstance(document, dict):
        raise ConfigError.single(str(path), "is not a JSON object")
    return document


def _template_source(folder: Path, settings: Mapping[str, Any]) -> str | None:
    """The newer place is a file of its own; the older one, a setting, may hold several by name."""
    path = folder / "chat_template.jinja"
    if path.is_file():
        try:
            return path.read_text(encoding="utf-8")
        except (OSError, ValueError) as fault:
            raise ConfigError.single(str(path), f"cannot be read: {fault}") from None
    template = settings.get("chat_template")
    if isinstance(template, list):
        named = {entry.get("name"): entry.get("template") for entry in template if isinstance(entry, dict)}
        template = named.get("default")
    return template if isinstance(template, str) else None


def _special_tokens(settings: Mapping[str, Any]) -> dict[str, str]:
    """A special token is written as its text, or as an object that has it."""
    named = {name: settings.get(name) for name in _SPECIAL_TOKENS}
    texts = {name: token.get("content") if isinstance(token, dict) else token for name, token in named.items()}
    return {name: text for name, text in texts.items() if isinstance(text, str)}
