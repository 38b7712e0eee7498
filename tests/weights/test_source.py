"""A checkpoint's files: what they are, and what is refused before an engine reads them."""

import json
import os
import struct
from pathlib import Path
from typing import Any

import pytest
import torch
from chimera.errors import WeightsError
from chimera.weights.source import require_sound, stamps
from safetensors.torch import save_file


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    save_file({"a": torch.zeros(4, 4), "b": torch.ones(3, dtype=torch.bfloat16)}, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text("{}")
    return tmp_path


def rewrite(path: Path, change: Any) -> None:
    """Change the header of a safetensors file and leave its bytes."""
    content = path.read_bytes()
    (length,) = struct.unpack("<Q", content[:8])
    header = json.loads(content[8 : 8 + length])
    change(header)
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + content[8 + length :])


def test_a_sound_checkpoint_passes(folder: Path) -> None:
    assert require_sound(folder) == 16 + 3, "elements"


def test_a_file_written_over_has_another_identity(folder: Path) -> None:
    before = stamps(folder)
    assert before == stamps(folder)
    path = folder / "model.safetensors"
    os.utime(path, ns=(1, 1))
    touched = stamps(folder)
    assert touched != before
    copy = folder / "copy"
    copy.write_bytes(path.read_bytes())
    os.utime(copy, ns=(1, 1))
    copy.rename(path)
    assert stamps(folder) != touched, "the same size and time, another file"


def test_files_that_no_engine_reads_do_not_count(folder: Path) -> None:
    before = stamps(folder)
    (folder / "README.md").write_text("words")
    assert stamps(folder) == before


@pytest.mark.parametrize("left", [0, 7, 40, -1])
def test_a_truncated_file_is_refused_by_name(folder: Path, left: int) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:left])
    with pytest.raises(WeightsError, match=r"model\.safetensors"):
        require_sound(folder)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda h: h["a"].update(shape=[4, 5]), "does not fill"),
        (lambda h: h["a"].update(dtype="F33"), "makes no sense"),
        (lambda h: h["a"].update(data_offsets=[0, 1 << 40]), "does not fill"),
        (lambda h: h["a"].update(data_offsets=[64, 0]), "does not fill"),
        (lambda h: h["a"].update(shape=[-4, -4]), "does not fill"),
        (lambda h: h["a"].update(shape="x"), "makes no sense"),
        (lambda h: h.update(c={"dtype": "U8", "shape": [6], "data_offsets": [0, 6]}), "begins at byte"),
        (lambda h: h.pop("b"), "bytes"),
        (lambda h: h.update(a=7), "makes no sense"),
    ],
)
def test_a_header_that_lies_is_refused(folder: Path, change: Any, words: str) -> None:
    rewrite(folder / "model.safetensors", change)
    with pytest.raises(WeightsError, match=words):
        require_sound(folder)


def test_a_header_longer_than_its_file_is_refused_unread(folder: Path) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(struct.pack("<Q", 1 << 60) + path.read_bytes()[8:])
    with pytest.raises(WeightsError, match="cut short"):
        require_sound(folder)


def test_an_index_that_promises_what_no_file_has_is_refused(folder: Path) -> None:
    weight_map = {"a": "model.safetensors", "gone": "model.safetensors"}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    with pytest.raises(WeightsError, match="gone should be in"):
        require_sound(folder)
