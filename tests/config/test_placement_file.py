"""Placement files mean what Prism's users mean by them; every fault is named at once, and nothing is started."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from chimera.config.deployment import Deployment, deployment_of_models, load_placement, survey_placement
from chimera.config.virtual_gpus import parse_virtual_gpus
from chimera.core.gpu import Gpu
from chimera.core.model import Slo, Tastes
from chimera.core.placement import Seat
from chimera.core.replica import ReplicaId
from chimera.errors import ConfigError
from chimera.units import GB, MIB

Write = Callable[..., Path]
MakeModel = Callable[..., Path]


def gpus(text: str = "2x1GiB") -> tuple[Gpu, ...]:
    return parse_virtual_gpus(text)


def entry(name: str = "a", path: str = "llama", **keys: Any) -> dict[str, Any]:
    return {"model_name": name, "model_path": path, **keys}


def seat(*gpu_ids: Any, **keys: Any) -> dict[str, Any]:
    return {"gpu_ids": list(gpu_ids), **keys}


@pytest.fixture
def load(write: Write, make_model: MakeModel) -> Callable[..., Deployment]:
    make_model("llama")

    def load_entries(*entries: Any, elastic: bool = True, on: str = "2x1GiB") -> Deployment:
        return load_placement(write(list(entries)), gpus(on), elastic)

    return load_entries


@pytest.fixture
def faults(load: Callable[..., Deployment]) -> Callable[..., list[str]]:
    def faults_of(*entries: Any, **how: Any) -> list[str]:
        with pytest.raises(ConfigError) as caught:
            load(*entries, **how)
        return [str(fault) for fault in caught.value.faults]

    return faults_of


Load = Callable[..., Deployment]
FaultsOf = Callable[..., list[str]]


def test_prisms_own_file_is_understood(load: Load, tmp_path: Path) -> None:
    deployment = load(
        entry("a", tokenizer_path="llama", tp_size=2, init_placements=[seat(0, 1, on=True, max_memory_pool_size=0.25)]),
        entry("b", init_placements=[seat(0, on=False), seat(1)]),
    )
    a, b = deployment.models
    assert (a.name, a.path, a.tokenizer_path, a.tp_size) == ("a", str(tmp_path / "llama"), str(tmp_path / "llama"), 2)
    assert (b.architecture, b.context_length, b.kv_bytes_per_token) == ("LlamaForCausalLM", 512, 2 * 2 * 2 * 16 * 2)
    assert deployment.placement.seats == (
        Seat(replica=ReplicaId("a", 0), gpu_ids=(0, 1), kv_limit_bytes=GB // 4),
        Seat(replica=ReplicaId("b", 1), gpu_ids=(1,)),
    )


def test_every_key_of_ours_reaches_the_model(load: Load) -> None:
    (model,) = load(
        entry(
            aliases=["small", "fast"],
            slo={"ttft_ms": 500, "tpot_ms": 50},
            priority=3,
            preload=True,
            keep_alive="5m",
            engine="simulated",
            engine_args={"kv_cache_dtype": "fp8_e5m2", "attention_backend": "triton"},
            dtype="float32",
            quantization="fp8",
            context_length=256,
            drain_s=5,
        )
    ).models
    assert model.aliases == ("small", "fast")
    assert model.slo == Slo(ttft_s=0.5, tpot_s=0.05)
    assert (model.priority, model.preload, model.pin, model.keep_alive_s, model.drain_s) == (3, True, False, 300.0, 5.0)
    assert (model.engine, model.dtype, model.quantization, model.context_length) == ("simulated", "float32", "fp8", 256)
    assert model.engine_args == {"kv_cache_dtype": "fp8_e5m2", "attention_backend": "triton"}
    assert model.kv_bytes_per_token == 2 * 2 * 2 * 16 * 1


def test_the_makers_taste_is_taken_unless_the_entry_says_openai(load: Load, tmp_path: Path) -> None:
    plain = entry("plain", engine_args={"sampling_defaults": "openai"})
    (tmp_path / "llama" / "generation_config.json").write_text('{"temperature": 0.6}')
    assert [model.tastes for model in load(entry("a"), plain).models] == [Tastes(temperature=0.6), Tastes()]


@pytest.mark.parametrize(
    ("written", "seconds", "pinned"),
    [(None, None, False), (0, 0.0, False), (90, 90.0, False), ("45s", 45.0, False), (-1, None, True), ("-1", None, True)],
)
def test_keep_alive_is_spelt_as_ollama_spells_it(load: Load, written: Any, seconds: float | None, pinned: bool) -> None:
    (model,) = load(entry(keep_alive=written)).models
    assert (model.keep_alive_s, model.pin) == (seconds, pinned)


def test_settings_may_stand_beside_the_models(write: Write, make_model: MakeModel) -> None:
    make_model("llama")
    file = {"$schema": "x", "policy": "time-sharing", "gpus": "2x512MiB", "models": [entry(init_placements=[seat(1)])]}
    deployment = load_placement(write(file), None)
    assert deployment.policy == "time-sharing"
    assert [gpu.capacity_bytes for gpu in deployment.gpus] == [512 * MIB] * 2
    assert load_placement(write(file), gpus("4x1GiB")).gpus == gpus("4x1GiB"), "what the machine has goes first"


def test_a_machine_without_gpus_lends_as_many_as_the_file_names(write: Write, make_model: MakeModel) -> None:
    make_model("llama")
    assert len(load_placement(write([entry(init_placements=[seat(0), seat(2)])]), None).gpus) == 3


def test_relative_paths_start_at_the_file_and_then_at_the_working_directory(
    write: Write, make_model: MakeModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_model("files/llama")
    make_model("cwd/llama", num_hidden_layers=5)
    make_model("cwd/other", num_hidden_layers=7)
    monkeypatch.chdir(tmp_path / "cwd")
    models = load_placement(write([entry("a", "llama"), entry("b", "./other")], "files/p.json"), None).models
    assert [model.path for model in models] == [str(tmp_path / "files/llama"), str(tmp_path / "cwd/other")]


def test_the_environment_names_the_folder(write: Write, make_model: MakeModel, tmp_path: Path) -> None:
    make_model("llama")
    path = write("- {model_name: a, model_path: '${env.MODELS}/llama'}", "p.yaml")
    assert load_placement(path, None, environment={"MODELS": str(tmp_path)}).models[0].path == str(tmp_path / "llama")


def test_faults_of_every_kind_are_named_in_one_go(faults: FaultsOf) -> None:
    said = faults(
        {"model_name": "a", "model_pth": "llama", "init_placements": [seat(0, 7, on="yes", max_memory_pool_size=-1)]},
        entry("a", "nowhere/at/all", tp_size="2", aliases=["b", "b"]),
        entry("auto", keep_alive="5 parsecs", engine_args={"--page-size": 1, "dtype": "half"}, context_length=513),
        entry("d", slo={"ttft": 5}, tp_size=3, quantization="awq"),
        "e",
    )
    assert said == [
        "[0].model_pth: unknown key (did you mean model_path?)",
        "[0].model_path: is missing (it is text)",
        "[0].init_placements[0].on: expected true or false, found the text 'yes'",
        "[0].init_placements[0].max_memory_pool_size: -1 is not more than 0",
        "[0].init_placements[0].gpu_ids: names 2 GPUs, but tp_size is 1",
        "[0].init_placements[0].gpu_ids[1]: there is no GPU 7 (there are 0 to 1)",
        "[1].tp_size: expected a whole number, found the text '2'",
        "[1].model_path: no folder 'nowhere/at/all'",
        "[1].model_name: 'a' is already the name at [0].model_name",
        "[1].aliases[1]: 'b' is already the name at [1].aliases[0]",
        "[2].model_name: 'auto' has a meaning of its own (it lets the server choose a model)",
        "[2].keep_alive: '5 parsecs' is not a duration: a number and one of ms, s, m, h, d",
        "[2].engine_args: '--page-size' is not spelt like an option (write page_size)",
        "[2].engine_args: dtype belongs to the model's entry (move it one level up)",
        "[2].context_length: 513 exceeds the model's 512",
        "[3].slo.ttft: unknown key (did you mean ttft_ms?)",
        "[3].tp_size: tp_size 3 does not divide model.layers.0.self_attn.q_proj (64 × 64, in runs of 16)",
        "[3].quantization: quantization 'awq' needs a checkpoint stored that way; only fp8 is made at load",
        "[4]: expected an object, found the text 'e'",
    ]


def test_a_repeated_gpu_is_a_fault(faults: FaultsOf) -> None:
    said = faults(entry(tp_size=2, init_placements=[seat(1, 1)]))
    assert said == ["[0].init_placements[0].gpu_ids: names a GPU twice"]


def test_one_mistake_is_named_once(faults: FaultsOf) -> None:
    said = faults(entry(tp_size=2, init_placements=[seat("0", 0, 0)]))
    assert said == ["[0].init_placements[0].gpu_ids[0]: expected a whole number, found the text '0'"]


def test_a_misspelt_folder_brings_its_neighbours_name(faults: FaultsOf) -> None:
    assert faults(entry(path="./lama")) == ["[0].model_path: no folder './lama' (did you mean llama?)"]


@pytest.mark.parametrize("document", ["3", "null", '"text"', "[]", '{"models": []}', "{}"])
def test_a_file_without_a_model_is_one_fault(write: Write, document: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load_placement(write(document), None)
    assert len(caught.value.faults) == 1


def test_static_pools_and_weights_have_to_fit_together(faults: FaultsOf, load: Load) -> None:
    pool = {"max_memory_pool_size": 0.6}
    entries = entry("a", init_placements=[seat(0, **pool), seat(1, **pool)]), entry("b", init_placements=[seat(0, **pool)])
    (said,) = faults(*entries, elastic=False)
    assert said.startswith("[1].init_placements[0]: weights and pools up to here ask for 1.1 GiB of GPU 0, which has 1 GiB")
    assert load(*entries, elastic=True)


def test_a_model_that_needs_more_gpus_than_there_are_is_refused(faults: FaultsOf) -> None:
    assert faults(entry(tp_size=4)) == ["[0].tp_size: the model needs 4 GPUs of 48.6 KiB, and there are 2"]


def test_weights_count_in_the_static_sum(faults: FaultsOf, load: Load, make_model: MakeModel) -> None:
    make_model("heavy", vocab_size=1 << 20, hidden_size=256, num_attention_heads=4)  # 1 GiB in two halves
    most = 0.02
    assert load(entry("a", "heavy", init_placements=[seat(0, max_memory_pool_size=most)]), on="1x1100MiB", elastic=False)
    (said,) = faults(
        entry("a", "heavy", init_placements=[seat(0, max_memory_pool_size=5 * most)]), on="1x1100MiB", elastic=False
    )
    assert "ask for 1.1 GiB of GPU 0" in said


def test_only_entries_that_are_on_are_summed(load: Load) -> None:
    off = entry("b", init_placements=[seat(0, on=False, max_memory_pool_size=0.9)])
    assert load(entry("a", init_placements=[seat(0, max_memory_pool_size=0.9)]), off, elastic=False)


def test_weights_too_large_for_a_gpu_are_refused_even_when_elastic(faults: FaultsOf, make_model: MakeModel) -> None:
    make_model("heavy", vocab_size=1 << 20, hidden_size=256, num_attention_heads=4)
    placed = entry("a", "heavy", init_placements=[seat(0, on=False)])
    assert "do not fit on GPU 0 with 512 MiB" in faults(placed, on="2x512MiB")[0]
    assert "needs 1 GPUs of 1.0 GiB, and there are 0" in faults(entry("a", "heavy"), on="2x512MiB")[0]


def test_one_folder_may_serve_under_many_names(load: Load) -> None:
    assert [model.name for model in load(*(entry(f"llama-{n:02d}") for n in range(18))).models][-1] == "llama-17"


def test_a_hub_model_that_is_not_here_is_said_to_be_unchecked(write: Write) -> None:
    survey = survey_placement(write([entry(path="nobody/no-such-model-here")]), gpus("1x1GiB"))
    assert survey.absent == {"nobody/no-such-model-here": ("[0].model_path",)}
    assert survey.checkpoints == {}


def test_models_alone_are_spread_over_the_gpus(make_model: MakeModel) -> None:
    paths = [str(make_model(f"{letter}/llama")) for letter in "abc"]
    deployment = deployment_of_models(paths, gpus())
    assert [model.name for model in deployment.models] == ["llama", "llama-2", "llama-3"]
    assert [seat.gpu_ids for seat in deployment.placement.seats] == [(0,), (1,), (0,)]


def test_a_model_alone_takes_as_many_gpus_as_it_needs(make_model: MakeModel) -> None:
    heavy = make_model("heavy", vocab_size=1 << 20, hidden_size=256, num_attention_heads=4)
    deployment = deployment_of_models([str(heavy)], gpus("4x800MiB"))
    assert deployment.models[0].tp_size == 2
    assert deployment.placement.seats[0].gpu_ids == (0, 1)
    with pytest.raises(ConfigError, match=r"1\.0 GiB of weights do not fit"):
        deployment_of_models([str(heavy)], gpus("2x256MiB"))


def test_models_alone_have_all_their_faults_named(make_model: MakeModel, tmp_path: Path) -> None:
    bare = make_model("bare")
    (bare / "tokenizer.json").unlink()
    with pytest.raises(ConfigError) as caught:
        deployment_of_models([str(bare), str(tmp_path / "nowhere")], gpus())
    assert [fault.where for fault in caught.value.faults] == [str(bare), str(tmp_path / "nowhere")]
