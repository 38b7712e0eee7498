"""Figures are told the same way by every script, and a missed goal fails the script."""

import json
from pathlib import Path

import pytest

from benchmark.report import Figures, number, parser, percentile


def lines(capsys: pytest.CaptureFixture[str]) -> list[str]:
    return [line for line in capsys.readouterr().out.splitlines() if not line.startswith("#")]


def test_a_figure_is_one_line_with_its_goal(capsys: pytest.CaptureFixture[str]) -> None:
    figures = Figures("wire")
    figures.add("encode", 12.345, "µs", at_most=150)
    figures.add("rate", 1234567.0, "1/s", at_least=2e6, spread=(1e6, 2e6))
    figures.add("share", 0.5, "", at_least=0.4, at_most=0.6)
    figures.add("size", 7, "bytes")
    assert lines(capsys) == [
        "encode: 12.3 µs (goal ≤ 150) ok",
        "rate: 1,234,567 1/s [1,000,000–2,000,000] (goal ≥ 2,000,000) short",
        "share: 0.5 (goal ≤ 0.6 and ≥ 0.4) ok",
        "size: 7 bytes",
    ]


def test_a_goal_in_words_stands_for_the_bound_that_judges_it(capsys: pytest.CaptureFixture[str]) -> None:
    figures = Figures("words")
    figures.add("elastic against fixed", 0.97, "×", "within 5 %", at_least=0.95)
    figures.add("of interest", 3, "GB/s", "link speed")
    assert lines(capsys) == ["elastic against fixed: 0.97 × (goal within 5 %) ok", "of interest: 3 GB/s (goal link speed)"]


def test_the_script_fails_only_when_a_goal_is_missed() -> None:
    figures = Figures("exit")
    figures.add("free", 1, "s")
    figures.add("kept", 1, "s", at_most=1)
    assert figures.finish() == 0
    figures.add("missed", 1.01, "s", at_most=1)
    figures.add("kept again", 1, "s", at_most=1)
    assert figures.finish() == 1


def test_a_figure_that_is_not_a_number_misses_its_goal() -> None:
    figures = Figures("nan")
    figures.add("ratio", float("nan"), "×", at_least=0)
    assert figures.finish() == 1


def test_samples_give_their_median_and_spread(capsys: pytest.CaptureFixture[str]) -> None:
    Figures("samples").samples("pause", [5, 1, 2, 3, 4, 100, 6, 7, 8, 9], "ms", at_most=6)
    assert lines(capsys) == ["pause: 5.5 ms [1–9] (goal ≤ 6) ok"]


def test_the_header_names_what_a_reader_needs_to_repeat_the_run(capsys: pytest.CaptureFixture[str]) -> None:
    Figures("everything", seed=7, facts={"gpu": "none"})
    header = capsys.readouterr().out.splitlines()
    assert header[0] == "# everything"
    assert [line.split(":")[0] for line in header[1:]] == ["# machine", "# python", "# commit", "# date", "# seed", "# gpu"]
    assert header[-2:] == ["# seed: 7", "# gpu: none"]


def test_json_holds_the_same_figures(tmp_path: Path) -> None:
    options = parser("any").parse_args(["--json", str(tmp_path / "out.json")])
    figures = Figures("kept", seed=options.seed)
    figures.add("decode", 3.5, "µs", at_most=2, spread=0.5)
    assert figures.finish(options.json) == 1
    told = json.loads((tmp_path / "out.json").read_text())
    assert (told["title"], told["seed"]) == ("kept", "42")
    assert told["figures"] == [
        {"name": "decode", "value": 3.5, "unit": "µs", "goal": "≤ 2", "ok": False, "spread": [3.0, 4.0]},
    ]


@pytest.mark.parametrize(("percent", "value"), [(0, 1), (10, 1), (50, 5), (90, 9), (99, 10), (100, 10)])
def test_percentiles_are_values_that_occurred(percent: float, value: float) -> None:
    assert percentile(range(10, 0, -1), percent) == value


@pytest.mark.parametrize(
    ("value", "text"), [(0.012345, "0.0123"), (0, "0"), (150, "150"), (99.96, "100"), (1234.5, "1,234"), (float("inf"), "inf")]
)
def test_numbers_have_three_digits(value: float, text: str) -> None:
    assert number(value) == text
