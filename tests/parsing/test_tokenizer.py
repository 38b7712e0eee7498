import json
from pathlib import Path

import pytest
from chimera.errors import ConfigError, RequestError
from chimera.parsing.tokenizer import ModelTokenizer

from tests.parsing.vocabularies import byte_level

HI = [{"role": "user", "content": "the"}]


def folder(path: Path, settings: dict[str, object] | None = None, template: str | None = None) -> Path:
    tokenizer = byte_level()
    tokenizer.enable_truncation(3)
    tokenizer.enable_padding(length=8)
    tokenizer.save(str(path / "tokenizer.json"))
    if settings is not None:
        (path / "tokenizer_config.json").write_text(json.dumps(settings))
    if template is not None:
        (path / "chat_template.jinja").write_text(template)
    return path


def test_a_prompt_is_neither_cut_nor_padded_whatever_training_did(tmp_path: Path) -> None:
    model = ModelTokenizer.load(folder(tmp_path))
    assert len(model.encode("a b c d e f")) == 12
    assert len(model.encode("")) == 1


def test_plain_prompts_get_the_models_first_token_and_chats_only_what_their_template_writes(tmp_path: Path) -> None:
    model = ModelTokenizer.load(folder(tmp_path, {"bos_token": "<s>"}, "{{ bos_token }}{{ messages[0].content }}"))
    assert model.encode("the") == model.encode_chat(HI)
    assert model.encode_chat(HI).count(0) == 1


@pytest.mark.parametrize(
    "settings",
    [
        {"chat_template": "{{ eos_token }}", "eos_token": "</s>"},
        {
            "chat_template": [{"name": "rag", "template": "x"}, {"name": "default", "template": "{{ eos_token }}"}],
            "eos_token": "</s>",
        },
        {"chat_template": "{{ eos_token }}", "eos_token": {"content": "</s>", "lstrip": False}},
    ],
)
def test_older_homes_of_the_template_are_known(tmp_path: Path, settings: dict[str, object]) -> None:
    assert ModelTokenizer.load(folder(tmp_path, settings)).encode_chat(HI) == [1]


def test_special_tokens_may_stand_in_their_own_file(tmp_path: Path) -> None:
    (tmp_path / "special_tokens_map.json").write_text('{"eos_token": "</s>"}')
    assert ModelTokenizer.load(folder(tmp_path, {"chat_template": "{{ eos_token }}"})).encode_chat(HI) == [1]


def test_a_model_without_a_template_completes_but_does_not_chat(tmp_path: Path) -> None:
    with pytest.raises(RequestError, match="no chat template"):
        ModelTokenizer.load(folder(tmp_path)).encode_chat(HI)


def test_a_folder_without_a_tokenizer_says_so(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"no tokenizer\.json"):
        ModelTokenizer.load(tmp_path)


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json"])
@pytest.mark.parametrize("content", [b"{", b"[]", b"\xff\xfe"])
def test_a_damaged_file_is_named(tmp_path: Path, name: str, content: bytes) -> None:
    folder(tmp_path)
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ConfigError, match=name):
        ModelTokenizer.load(tmp_path)
