"""From one placement file to the next: what is different, and nothing else; and models that a request names."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from chimera.cli.filing import Filing
from chimera.config.change import Change, change
from chimera.config.deployment import deployment_of_entry, load_placement
from chimera.config.roots import Roots
from chimera.core.replica import ReplicaId
from chimera.errors import ConfigError

from tests.config.test_placement_file import entry, gpus, seat

Write = Callable[..., Path]
MakeModel = Callable[..., Path]
Changed = Callable[[Any, Any], Change]


@pytest.fixture
def changed(write: Write, make_model: MakeModel) -> Changed:
    make_model("llama")
    make_model("other")

    def changed_from(before: Any, after: Any) -> Change:
        return change(*(load_placement(write(contents), gpus("3x1GiB")) for contents in (before, after)))

    return changed_from


BEFORE = [entry("a", init_placements=[seat(0)]), entry("b", init_placements=[seat(1, max_memory_pool_size=0.1)])]


def test_the_same_file_is_no_change(changed: Changed) -> None:
    assert not changed(BEFORE, [dict(one) for one in reversed(BEFORE)])


def test_each_thing_that_is_different_is_found_and_named(changed: Changed) -> None:
    after = [
        entry("a", init_placements=[seat(2)], slo={"ttft_ms": 100}),
        entry("c", path="other", init_placements=[seat(1)]),
    ]
    found = changed(BEFORE, after)
    assert [spec.name for spec in found.models] == ["a", "c"]
    assert found.removed == ("b",) and found.unseated == (ReplicaId("b"),)
    assert {(one.replica, one.gpu_ids) for one in found.seats} == {(ReplicaId("a"), (2,)), (ReplicaId("c"), (1,))}
    assert found.words == (
        "b is removed, once its requests are done",
        "a: slo changed",
        "c is registered",
        "a/0 is wanted on GPU 2, no longer on GPU 0",
        "c/0 is wanted on GPU 1",
    )


def test_other_files_and_another_limit_are_told_as_what_they_mean(changed: Changed) -> None:
    after = [entry("a", path="other"), entry("b", init_placements=[seat(1, max_memory_pool_size=0.2)])]
    found = changed(BEFORE, after)
    assert found.words == (
        "a: path, tokenizer_path changed, so it is loaded anew",
        "a/0 is no longer wanted on GPU 0",
        "b/0 may hold 0.2 GB of KV memory",
    )
    assert [one.kv_limit_bytes for one in found.seats] == [200_000_000]


def test_a_policy_that_the_file_names_is_a_change_and_one_that_it_leaves_out_is_none(changed: Changed) -> None:
    named = {"models": BEFORE, "policy": "flexible", "local": "fcfs"}
    assert changed(BEFORE, named).words == ("policy is flexible", "local is fcfs")
    assert not changed(named, BEFORE)


@pytest.mark.parametrize("said", [{"warm": {"max_models": 3}}, {"gpus": "2x1GiB"}])
def test_what_takes_a_new_start_is_named(changed: Changed, said: dict[str, Any]) -> None:
    (word,) = changed(BEFORE, {"models": BEFORE, **said}).words
    assert word == f"{next(iter(said))} has changed, which takes a new start of the server"


@pytest.mark.parametrize(
    ("flag", "words"), [(None, ("gpus has changed, which takes a new start of the server",)), ("2x1GiB", ())]
)
def test_other_gpus_are_named_unless_a_flag_has_settled_them(
    write: Write, make_model: MakeModel, tmp_path: Path, flag: str | None, words: tuple[str, ...]
) -> None:
    make_model("llama")
    file = write({"gpus": "2x1GiB", "models": BEFORE})
    filing = Filing(
        in_force=load_placement(file, None if flag is None else gpus(flag)),
        file=file,
        elastic=True,
        roots=Roots([tmp_path]),
        flags=frozenset() if flag is None else frozenset({"filed_gpus"}),
    )
    assert not filing.read_again()[1]
    write({"gpus": "4x1GiB", "models": BEFORE})
    fresh, found = filing.read_again()
    assert found.words == words
    assert fresh.gpus == filing.in_force.gpus, "a running server keeps those that it has"


def test_who_comes_later_and_is_off_is_prepared_unless_it_is_in_force_already(
    write: Write, make_model: MakeModel, tmp_path: Path
) -> None:
    make_model("llama")
    make_model("other")
    file = write(BEFORE)
    filing = Filing(
        in_force=load_placement(file, gpus("3x1GiB")), file=file, elastic=True, roots=Roots([tmp_path]), beforehand=True
    )
    off = [entry("off"), entry("seated", init_placements=[seat(0)])]
    promised = [entry("a", slo={"ttft_ms": 100}), entry("b", path="other")]
    write([*promised, *off])
    assert [model.name for model in filing.to_prepare(filing.read_again()[1])] == ["b", "off"]
    filing.beforehand = False
    assert not filing.to_prepare(filing.read_again()[1])


class TestAnEntryByRequest:
    @pytest.fixture
    def faults_of(self, tmp_path: Path, make_model: MakeModel) -> Callable[..., str]:
        make_model("inside/llama")
        make_model("outside/llama")
        (tmp_path / "inside" / "link").symlink_to(tmp_path / "outside" / "llama")

        def faults_of(**keys: Any) -> str:
            written = entry("n", keys.pop("path", "llama"), **keys)
            try:
                deployment_of_entry(written, gpus(), roots=Roots([tmp_path / "inside"]))
            except ConfigError as refusal:
                return str(refusal)
            return ""

        return faults_of

    def test_a_model_in_a_root_is_taken_with_its_seats(self, tmp_path: Path, make_model: MakeModel) -> None:
        make_model("llama")
        written = entry("n", init_placements=[seat(1)], aliases=["m"])
        one = deployment_of_entry(written, gpus(), roots=Roots([tmp_path]))
        assert (one.models[0].name, one.models[0].aliases, one.placement.seats[0].gpu_ids) == ("n", ("m",), (1,))

    @pytest.mark.parametrize("path", ["../outside/llama", "link", "{tmp}/outside/llama", "~/llama", "..", "/etc"])
    def test_no_path_leads_out_of_the_roots(self, path: str, faults_of: Callable[..., str], tmp_path: Path) -> None:
        for key in ("path", "tokenizer_path"):
            assert "not in a folder that models may come from" in faults_of(**{key: path.replace("{tmp}", str(tmp_path))})

    def test_options_name_no_path(self, faults_of: Callable[..., str]) -> None:
        assert "speculative_draft_model_path names a path" in faults_of(engine_args={"speculative_draft_model_path": "/x"})
        assert "lora_paths names a path" in faults_of(engine_args={"lora_paths": [{"lora_path": "/x"}]})

    def test_every_fault_is_named_at_once_and_nothing_is_downloaded(self, faults_of: Callable[..., str]) -> None:
        told = faults_of(tp_size="two", pinn=True)
        assert "tp_size" in told and "did you mean pin" in told
        assert "not on this machine" in faults_of(path="nobody/has-this")
        assert "no GPU 7" in faults_of(init_placements=[seat(7)])
