"""Other people's traces: what is understood of each, and what a file is never allowed to do."""

from __future__ import annotations

import json
import pickle
import struct
from pathlib import Path
from typing import Any

import pytest
from chimera.errors import ConfigError
from chimera.trace import prism
from chimera.trace.reader import read_trace, rows_of
from chimera.trace.sharegpt import Exchange, read_exchanges
from chimera.trace.trace import Row, Trace


def test_burst_gpt_is_read_without_its_failures(tmp_path: Path) -> None:
    path = tmp_path / "b.csv"
    head = "Timestamp,Model,Request tokens,Response tokens,Total tokens,Log Type\n"
    path.write_text(head + "5,ChatGPT,472,18,490,Conversation log\n9,GPT-4,7,0,7,API log\n45,GPT-4,1087,230,1317,API log\n")
    assert read_trace(path).rows == (Row(5.0, "ChatGPT", 472, 18), Row(45.0, "GPT-4", 1087, 230))


def test_mooncake_tells_milliseconds_and_prefix_blocks(tmp_path: Path) -> None:
    path = tmp_path / "conv.jsonl"
    path.write_text(
        '{"timestamp": 0, "input_length": 6758, "output_length": 500, "hash_ids": [0, 1, 2]}\n\n'
        '{"timestamp": 3000, "input_length": 700, "output_length": 3, "hash_ids": [0, 9]}\n'
    )
    assert read_trace(path).rows == (Row(0.0, "conv", 6758, 500, (0, 1, 2)), Row(3.0, "conv", 700, 3, (0, 9)))


@pytest.mark.parametrize("line", ['{"timestamp": 1}', '{"timestamp": 1, "input_length": 0, "output_length": 1}', "{broken"])
def test_a_fault_in_a_line_of_json_names_it(tmp_path: Path, line: str) -> None:
    path = tmp_path / "t.jsonl"
    path.write_text('{"timestamp": 0, "input_length": 1, "output_length": 1}\n' + line + "\n")
    with pytest.raises(ConfigError, match="line 2"):
        read_trace(path)


def test_only_the_wanted_slice_is_read(tmp_path: Path) -> None:
    path = tmp_path / "t.csv"
    rows = "".join(f"{at},m,1,1\n" for at in range(100))
    path.write_text("timestamp,model,prompt_tokens,output_tokens\n" + rows + "this is no row\n")
    assert [row.at_s for row in read_trace(path, 10, 13).rows] == [0.0, 1.0, 2.0]
    assert sum(1 for _, row in zip(range(5), rows_of(path), strict=False)) == 5
    with pytest.raises(ConfigError, match="line 102"):
        read_trace(path)


def test_of_a_conversation_the_first_question_and_answer_count(tmp_path: Path) -> None:
    path = tmp_path / "s.json"
    path.write_text(
        json.dumps(
            [
                {"id": "a", "conversations": [{"from": "human", "value": "one two"}, {"from": "gpt", "value": "three"}]},
                {"id": "b", "conversations": [{"from": "gpt", "value": "hello"}, {"from": "human", "value": "yes"}]},
                {"id": "c", "conversations": []},
            ]
        )
    )
    assert read_exchanges(path, lambda text: len(text.split())) == [Exchange("one two", 2, 1)]
    with pytest.raises(ConfigError, match="--dataset"):
        read_trace(path)


class Request:
    """As Prism's and VTC's modules have it; pickled under this module's name."""

    def __init__(self, adapter: str, prompt_len: Any, output_len: Any, req_time: Any) -> None:
        self.req_id, self.model_dir, self.adapter_dir = 0, "dummy", adapter
        self.prompt, self.prompt_len, self.output_len, self.req_time = "Hello " * 3, prompt_len, output_len, req_time


def pickled(tmp_path: Path, document: object, protocol: int = 4) -> Path:
    path = tmp_path / "real_trace.pkl"
    path.write_bytes(pickle.dumps(document, protocol))
    return path


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_prisms_pickle_is_read_in_order_of_time(tmp_path: Path, protocol: int) -> None:
    requests = [Request("dummy-lora-7b-rank-8-5", 3, 4, 2.5), Request("dummy-lora-7b-rank-8-14", 1, 2, 0.5)]
    trace = read_trace(pickled(tmp_path, (["dummy-5", "dummy-14"], requests), protocol))
    assert trace.rows == (Row(0.5, "adapter-14", 1, 2), Row(2.5, "adapter-5", 3, 4))


def test_numbers_of_numpy_are_read_without_numpy(tmp_path: Path) -> None:
    import numpy as np

    requests = [Request("x-5", np.int64(30), np.int32(40), np.float64(1.25))]
    assert read_trace(pickled(tmp_path, ([], requests))).rows == (Row(1.25, "adapter-5", 30, 40),)


class Malice:
    def __init__(self, call: Any, *arguments: Any) -> None:
        self._made = call, arguments

    def __reduce__(self) -> Any:
        return self._made


def test_a_pickle_that_would_run_code_is_refused_and_runs_nothing(tmp_path: Path) -> None:
    import os
    import subprocess

    trap = tmp_path / "trap"
    for call, *arguments in (
        (os.system, f"touch {trap}"),
        (subprocess.check_call, ["touch", str(trap)]),
        (eval, f"open({str(trap)!r}, 'w')"),
        (getattr, "", "join"),
        (__import__, "os"),
    ):
        with pytest.raises(ConfigError, match="refused as a trace"):
            read_trace(pickled(tmp_path, ([], [Malice(call, *arguments)])))
    assert not trap.exists()


def _opcodes(*parts: bytes) -> bytes:
    return b"\x80\x04" + b"".join(parts) + b"."


def _text(value: str) -> bytes:
    return b"\x8c" + struct.pack("<B", len(value)) + value.encode()


def _named(module: str, name: str) -> bytes:
    return _text(module) + _text(name) + b"\x93"


@pytest.mark.parametrize(
    "program",
    [
        # Request.__reduce__ = …: a record's class is changed through its state.
        _opcodes(_named("x", "Request"), b"N}", _text("__setstate__"), _text("f"), b"s\x86b"),
        # A dotted name that walks out of an allowed module.
        _opcodes(_named("numpy.core.multiarray", "scalar.__globals__")),
        # The constructor of a stand-in is called on something else.
        _opcodes(_named("copyreg", "_reconstructor"), _named("builtins", "object"), b"\x85R"),
        # Something persistent.
        _opcodes(_text("id"), b"Q"),
        # Cut short.
        b"\x80\x04\x95",
    ],
)
def test_crafted_opcodes_are_refused(tmp_path: Path, program: bytes) -> None:
    path = tmp_path / "t.pkl"
    path.write_bytes(program)
    with pytest.raises(ConfigError, match="refused as a trace"):
        read_trace(path)


def test_a_plain_pickle_of_something_else_is_no_trace(tmp_path: Path) -> None:
    for document in (
        {"a": 1},
        ([], [{"adapter_dir": "x-1"}]),
        ([], [Request("none", 1, 1, 1.0)]),
        ([], [Request("x-1", 0, 1, 1.0)]),
    ):
        with pytest.raises(ConfigError):
            read_trace(pickled(tmp_path, document))


def test_adapters_are_dealt_to_models_and_copies_are_shifted() -> None:
    trace = Trace("t", (Row(5.0, "adapter-10", 1, 1), Row(12.0, "adapter-14", 1, 1), Row(13.0, "adapter-99", 1, 1)))
    dealt = prism.dealt(trace, prism.ADAPTERS_OF_18)
    assert [(row.at_s, row.model) for row in dealt.rows] == [
        (0.0, "model_14"),  # two copies of adapter 14 are earlier, the second before the beginning
        (2.0, "model_12"),
        (5.0, "model_2"),
        (12.0, "model_10"),
        (15.0, "model_6"),
        (25.0, "model_9"),
    ]
    assert prism.dealt(trace, prism.ADAPTERS_OF_8, ["model_2"]).rows == (Row(12.0, "model_2", 1, 1),)
