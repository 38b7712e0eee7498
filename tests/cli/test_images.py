"""Where a server keeps its images: in shared memory for its life, or in a folder that stays; or nowhere, and it says so."""

import argparse
import os
from pathlib import Path

import pytest
from chimera.cli import images
from chimera.core.model import ModelSpec
from chimera.errors import ConfigError
from chimera.units import MIB


def arguments(*words: str, engine: str = "sglang") -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    images.configure(parser)
    return parser.parse_args(words, argparse.Namespace(engine=engine))


def model(weight_bytes: int) -> ModelSpec:
    return ModelSpec(
        name="m",
        path="/nowhere",
        tokenizer_path="/nowhere",
        architecture="any",
        weight_bytes=weight_bytes,
        kv_bytes_per_token=1,
        context_length=1,
    )


SMALL = [model(MIB)]


@pytest.fixture(autouse=True)
def shared_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "shm"
    folder.mkdir()
    monkeypatch.setattr(images, "SHARED_MEMORY", folder)
    return folder


def silence(line: str) -> None:
    raise AssertionError(line)


def test_a_folder_in_shared_memory_goes_with_the_server(shared_memory: Path) -> None:
    with images.images_of(arguments(), SMALL, silence) as made:
        assert made is not None and made.folder.parent == shared_memory and made.budget_bytes is None
        assert made.folder.stat().st_mode & 0o077 == 0, "weights are nobody else's business"
    assert not list(shared_memory.iterdir())


def test_a_named_folder_stays(tmp_path: Path) -> None:
    folder = tmp_path / "kept" / "here"
    with images.images_of(arguments("--image-dir", str(folder), "--cpu-share-memory", "1GiB"), SMALL, silence) as made:
        assert made == images.Images(folder=folder, budget_bytes=1 << 30)
        (folder / "x.image").write_bytes(b"x")
    assert (folder / "x.image").exists()


def test_what_a_killed_server_left_goes_with_the_next_start(shared_memory: Path) -> None:
    left = shared_memory / "chimera-images-left"
    left.mkdir()
    (left / "owner.lock").touch()
    with images.images_of(arguments(), SMALL, silence) as mine:
        assert mine is not None and not left.exists()
        with images.images_of(arguments(), SMALL, silence):
            assert mine.folder.exists(), "a server that lives keeps its folder"


def test_models_that_do_not_fit_are_read_from_their_files_and_the_operator_is_told() -> None:
    said: list[str] = []
    with images.images_of(arguments("--cpu-share-memory", "20MiB"), [model(5 * MIB)], said.append) as made:
        assert made is None
    assert len(said) == 1 and "m needs 21 MiB" in said[0]


def test_asked_for_and_impossible_is_an_error() -> None:
    asked = arguments("--enable-cpu-share-memory", "--cpu-share-memory", "20MiB")
    with pytest.raises(ConfigError, match="m needs 21 MiB"), images.images_of(asked, [model(5 * MIB)], silence):
        pass


@pytest.mark.parametrize("asked", [arguments("--no-enable-cpu-share-memory"), arguments(engine="simulated")])
def test_not_wanted_or_of_no_use_makes_no_folder(asked: argparse.Namespace, shared_memory: Path) -> None:
    with images.images_of(asked, SMALL, silence) as made:
        assert made is None and not list(shared_memory.iterdir())


def test_a_size_that_is_none_is_refused() -> None:
    asked = arguments("--cpu-share-memory", "lots")
    with pytest.raises(ConfigError, match="lots"), images.images_of(asked, SMALL, silence):
        pass


@pytest.mark.skipif(os.geteuid() == 0, reason="nothing is forbidden to root")
def test_a_folder_that_may_not_be_made_is_refused(tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    with (
        pytest.raises(ConfigError, match="image-dir"),
        images.images_of(arguments("--image-dir", str(tmp_path / "x")), SMALL, silence),
    ):
        pass
