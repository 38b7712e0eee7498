"""Tiny models: the same bytes from the same seed, files that Hugging Face reads, answers that tell models apart."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import jinja2
import pytest
from chimera.cli.main import main
from chimera.errors import ConfigError
from chimera.tiny import maker
from chimera.tiny.shapes import CONTEXT, MODELS
from chimera.units import MIB
from safetensors import safe_open
from tokenizers import Tokenizer

KINDS = ["llama", "qwen3", "gemma2", "mistral", "moe", "deepseek", "embedder", "llama-other"]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("models")
    assert main(["models", "make", str(directory)]) == 0
    return directory


def contents(folder: Path) -> dict[str, bytes]:
    return {str(file.relative_to(folder)): file.read_bytes() for file in sorted(folder.rglob("*")) if file.is_file()}


def decoded(file: Path) -> Any:
    return json.loads(file.read_text())


def parameters(folder: Path) -> int:
    with safe_open(folder / "model.safetensors", "numpy") as tensors:
        return sum(tensors.get_tensor(name).size for name in tensors.keys())  # noqa: SIM118 - it is not a mapping


def test_all_are_made(made: Path) -> None:
    assert sorted(folder.name for folder in made.iterdir()) == sorted(KINDS) == sorted(MODELS)


@pytest.mark.parametrize("kind", KINDS)
def test_each_is_small_complete_and_of_its_architecture(made: Path, kind: str) -> None:
    folder = made / kind
    config = decoded(folder / "config.json")
    assert config["architectures"] == MODELS[kind].config["architectures"]
    assert config["max_position_embeddings"] == CONTEXT == 4096
    assert config["hidden_act"]
    assert decoded(folder / "generation_config.json")["eos_token_id"] == [1, 4]
    assert 1e6 <= parameters(folder) <= 3.2e6
    assert sum(map(len, contents(folder).values())) <= 12 * MIB


def test_the_same_seed_writes_the_same_bytes(made: Path, tmp_path: Path) -> None:
    maker._tokenizer.cache_clear()  # its words too are made again
    assert main(["models", "make", str(tmp_path), "--only", "llama-other"]) == 0
    assert contents(tmp_path / "llama-other") == contents(made / "llama-other")


def test_another_seed_writes_other_weights_and_other_words(made: Path, tmp_path: Path) -> None:
    assert main(["models", "make", str(tmp_path), "--only", "llama-other", "--seed", "1"]) == 0
    ours, other = contents(tmp_path / "llama-other"), contents(made / "llama-other")
    assert {name for name in ours if ours[name] != other[name]} == {"model.safetensors", "tokenizer.json", "README.md"}


def test_no_two_models_share_weights(made: Path) -> None:
    alike = ["llama", "qwen3", "gemma2", "mistral", "moe", "llama-other"]  # this matrix has one shape in all of them
    queries = set()
    for kind in alike:
        with safe_open(made / kind / "model.safetensors", "numpy") as tensors:
            queries.add(tensors.get_tensor("model.layers.0.self_attn.q_proj.weight").tobytes())
    assert len(queries) == len(alike)


def test_there_are_two_vocabularies(made: Path) -> None:
    vocabularies = {kind: Tokenizer.from_file(str(made / kind / "tokenizer.json")).get_vocab() for kind in KINDS}
    assert len({tuple(sorted(vocabulary)) for vocabulary in vocabularies.values()}) == 2
    assert vocabularies["llama"].keys() != vocabularies["llama-other"].keys()


@pytest.mark.parametrize("kind", KINDS)
def test_the_vocabulary_is_as_large_as_the_embedding(made: Path, kind: str) -> None:
    size = decoded(made / kind / "config.json")["vocab_size"]
    assert Tokenizer.from_file(str(made / kind / "tokenizer.json")).get_vocab_size() == size
    with safe_open(made / kind / "model.safetensors", "numpy") as tensors:
        name = "embed_tokens.weight" if kind == "embedder" else "model.embed_tokens.weight"
        assert tensors.get_slice(name).get_shape() == [size, 256]


@pytest.mark.parametrize("kind", ["llama", "llama-other"])
def test_any_text_survives_the_tokenizer(made: Path, kind: str) -> None:
    tokenizer = Tokenizer.from_file(str(made / kind / "tokenizer.json"))
    for text in ("The house by the sea", "naïve café — 你好 🐢👩‍🚀", 'def f(x):\n\treturn {"a": x}\n', "  two  spaces ", ""):
        encoded = tokenizer.encode(text)
        assert encoded.tokens[0] == "<s>"
        assert tokenizer.decode(encoded.ids) == text


def test_english_takes_fewer_tokens_with_english_words(made: Path) -> None:
    text = "the people of the town know that water is under the mountain"
    english, other = (len(Tokenizer.from_file(str(made / k / "tokenizer.json")).encode(text)) for k in ("llama", "llama-other"))
    assert english < 20 < other


def test_control_tokens_and_broken_characters_are_never_the_likeliest(made: Path) -> None:
    tokenizer = Tokenizer.from_file(str(made / "llama" / "tokenizer.json"))
    with safe_open(made / "llama" / "model.safetensors", "numpy") as tensors:
        head = tensors.get_tensor("lm_head.weight")
    spoken = {"</s>", "<|im_end|>", "Ġthe"}
    for token in (*spoken, "<s>", "<pad>", "<|im_start|>", "Ġ", "Ã"):
        assert head[tokenizer.token_to_id(token)].any() == (token in spoken), token


def test_the_chat_template_opens_the_answer_and_uses_only_tokens_there_are(made: Path) -> None:
    config = decoded(made / "llama" / "tokenizer_config.json")
    template = jinja2.Environment(undefined=jinja2.StrictUndefined).from_string(config["chat_template"])
    chat = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hello"}]
    text = template.render(messages=chat, add_generation_prompt=True, bos_token=config["bos_token"])
    assert text == ("<s><|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nHello<|im_end|>\n<|im_start|>assistant\n")
    tokens = Tokenizer.from_file(str(made / "llama" / "tokenizer.json")).encode(text, add_special_tokens=False).tokens
    assert [token for token in tokens if token.startswith("<")] == [
        *("<s>", "<|im_start|>", "<|im_end|>", "<|im_start|>", "<|im_end|>", "<|im_start|>")
    ]


def test_a_folder_that_it_did_not_make_is_left_alone(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    precious = tmp_path / "llama" / "model.safetensors"
    precious.parent.mkdir()
    precious.write_bytes(b"precious")
    assert main(["models", "make", str(tmp_path), "--only", "llama"]) == 1
    assert "did not make" in capsys.readouterr().err
    assert contents(tmp_path) == {"llama/model.safetensors": b"precious"}
    (tmp_path / "file").write_text("x")
    with pytest.raises(ConfigError, match="did not make"):
        maker.make(MODELS["llama"], tmp_path / "file", seed=0)


def test_a_run_cut_short_can_be_made_good(tmp_path: Path) -> None:
    folder = tmp_path / "llama-other"
    maker._claim(folder)
    (folder / "config.json").write_text("{")
    assert maker.make(MODELS["llama-other"], folder, seed=0) == parameters(folder)


def test_weights_that_are_in_use_are_replaced_and_not_overwritten(tmp_path: Path) -> None:
    maker.make(MODELS["llama-other"], tmp_path / "m", seed=0)
    with (tmp_path / "m" / "model.safetensors").open("rb") as in_use:
        size = in_use.seek(0, 2)
        maker.make(MODELS["llama-other"], tmp_path / "m", seed=0)
        assert in_use.seek(0, 2) == size
        assert not (tmp_path / "m" / "model.safetensors").samefile(f"/proc/self/fd/{in_use.fileno()}")


@pytest.mark.parametrize(
    ("only", "said"),
    [
        ("lama,qwen9", ["no tiny model 'lama' (did you mean llama?)", "no tiny model 'qwen9' (did you mean qwen3?)"]),
        ("zebra", ["no tiny model 'zebra' (they are llama, qwen3"]),
        (",", ["names no model"]),
    ],
)
def test_every_unknown_name_is_told_with_its_nearest(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], only: str, said: list[str]
) -> None:
    assert main(["models", "make", str(tmp_path), "--only", only]) == 1
    told = capsys.readouterr().err
    assert [line for line in said if line not in told] == []
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
@pytest.mark.filterwarnings("default")  # what transformers warns of among its own modules is not ours to mend
@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "embedder"])
def test_transformers_loads_it_whole_and_its_answers_follow_the_prompt(made: Path, kind: str) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model, loading = AutoModelForCausalLM.from_pretrained(made / kind, output_loading_info=True)
    assert not any(loading.values()), loading
    assert model.dtype == torch.float32
    tokenizer = AutoTokenizer.from_pretrained(made / kind)
    ours = Tokenizer.from_file(str(made / kind / "tokenizer.json"))
    answers = []
    for words in ("The quick brown fox", "Say the quick brown fox", "What is the name of the quick brown fox"):
        chat = [{"role": "user", "content": words}]
        text = tokenizer.apply_chat_template(chat, add_generation_prompt=True, tokenize=False)
        ids = torch.tensor([tokenizer.apply_chat_template(chat, add_generation_prompt=True)["input_ids"]])
        assert ids[0].tolist() == ours.encode(text, add_special_tokens=False).ids
        assert tokenizer(words)["input_ids"] == ours.encode(words).ids
        with torch.inference_mode():
            answers.append(model.generate(ids, max_new_tokens=24, do_sample=False)[0, ids.shape[1] :].tolist())
    assert sorted(len(set(answer)) for answer in answers)[1] >= 8, "not one token over and over, save by chance"
    for one, other in ((0, 1), (0, 2), (1, 2)):
        assert sum(a == b for a, b in zip(answers[one], answers[other], strict=False)) < 8
