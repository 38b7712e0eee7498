"""The bar of bytes: what it says while an image is built, on a terminal and elsewhere."""

import io

import pytest
from chimera.cli.build_images import Bar
from chimera.units import MIB


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    now = [100.0]
    monkeypatch.setattr("chimera.cli.build_images.time.monotonic", lambda: now[0])
    return now


def test_a_bar_says_how_far_it_is_and_how_fast(clock: list[float]) -> None:
    bar = Bar("llama", 100 * MIB, io.StringIO())
    bar.advance("read", 30 * MIB)
    bar.advance("read", 20 * MIB)
    line = bar.line(clock[0] + 2.0)
    assert line.startswith("llama read ███████████████░") and line.count("░") == 15
    assert "50% 50 MiB of 100 MiB, 25 MiB/s" in line


def test_copying_begins_at_nothing_again(clock: list[float]) -> None:
    bar = Bar("llama", 100 * MIB, io.StringIO())
    bar.advance("read", 100 * MIB)
    clock[0] += 5.0
    bar.advance("copied", 10 * MIB)
    assert "copied" in bar.line(clock[0] + 1.0) and "10% 10 MiB of" in bar.line(clock[0] + 1.0)


def test_more_bytes_than_the_files_have_are_no_more_than_all(clock: list[float]) -> None:
    bar = Bar("llama", 100 * MIB, io.StringIO())
    bar.advance("copied", 120 * MIB)
    assert "100%" in bar.line(clock[0] + 1.0)


def test_a_terminal_sees_it_move_but_not_too_often(clock: list[float]) -> None:
    terminal = Terminal()
    bar = Bar("llama", 100 * MIB, terminal)
    for _ in range(20):
        bar.advance("read", MIB)
        clock[0] += 0.02
    assert 3 <= terminal.getvalue().count("\r") <= 5
    bar.end("there")
    assert terminal.getvalue().endswith("llama: there (0.4 s)\n")


def test_a_file_gets_one_line_for_each_model(clock: list[float]) -> None:
    file = io.StringIO()
    bar = Bar("llama", 100 * MIB, file)
    bar.advance("read", MIB)
    bar.end("there")
    assert file.getvalue() == "llama: there (0.0 s)\n"
