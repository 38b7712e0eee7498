"""Damaged frames: a valid message or a ProtocolError, never another exception and never a wait without an end."""

from __future__ import annotations

import struct
from datetime import timedelta

import pytest
from chimera.errors import ProtocolError
from chimera.wire.codec import VERSION, FrameReader, Message, decode, encode
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.wire.messages import messages

HEADER = struct.Struct("<2sHI")
# Every example has a deadline, so a hang fails; it is generous because other work shares the machine.
bounded = settings(deadline=timedelta(seconds=5), suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large])
quick = settings(bounded, max_examples=100, derandomize=True)
thorough = settings(bounded, max_examples=5000)

# The opcodes whose lengths lie, and the ones nothing should contain.
SPITEFUL = st.sampled_from(
    [b"\xc1", b"\xdd\xff\xff\xff\xff", b"\xdf\xff\xff\xff\xff", b"\xc6\xff\xff\xff\xff", b"\xd6\xff", b"\x91" * 2000]
)


@st.composite
def damaged(draw: st.DrawFn, whole: bytes) -> bytes:
    """`whole` after a few accidents: bytes changed, lost, repeated, or put in where they do not belong."""
    frame = bytearray(whole)
    for _ in range(draw(st.integers(1, 4))):
        start, end = sorted(draw(st.tuples(st.integers(0, len(frame)), st.integers(0, len(frame)))))
        match draw(st.sampled_from(("change", "lose", "repeat", "insert", "flip"))):
            case "change":
                frame[start : start + 4] = draw(st.binary(min_size=1, max_size=4))
            case "lose":
                del frame[start:end]
            case "repeat":
                frame[start:start] = frame[start:end]
            case "insert":
                frame[start:start] = draw(st.one_of(st.binary(max_size=8), SPITEFUL))
            case "flip" if start < len(frame):
                frame[start] ^= 1 << draw(st.integers(0, 7))
    return bytes(frame)


@st.composite
def damaged_frames(draw: st.DrawFn) -> bytes:
    frame = encode(draw(messages()))
    if draw(st.booleans()):
        return draw(damaged(frame))
    # A header that is right, so that the damage reaches the decoder.
    body = draw(damaged(frame[HEADER.size :]))
    return HEADER.pack(b"Ch", VERSION, len(body)) + body


@st.composite
def damaged_streams(draw: st.DrawFn) -> list[bytes]:
    """A stream with damage in it, in the pieces a socket might give."""
    whole = draw(damaged(b"".join(map(encode, draw(st.lists(messages(), min_size=1, max_size=4))))))
    cuts = sorted(draw(st.lists(st.integers(0, len(whole)), max_size=6)))
    return [whole[a:b] for a, b in zip([0, *cuts], [*cuts, len(whole)], strict=True)]


def check_frame(frame: bytes) -> None:
    try:
        message = decode(frame)
    except ProtocolError as refusal:
        assert str(refusal)
        return
    # What is let in can be passed on.
    again = encode(message)
    assert encode(decode(again)) == again


def check_stream(pieces: list[bytes]) -> None:
    found: list[Message] = []
    reader = FrameReader()
    try:
        for piece in pieces:
            found += reader.feed(piece)
        reader.close()
    except ProtocolError as refusal:
        assert str(refusal)
    for message in found:
        encode(message)


@quick
@given(damaged_frames())
def test_a_damaged_frame_is_refused_or_understood(frame: bytes) -> None:
    check_frame(frame)


@settings(quick, max_examples=50)
@given(damaged_streams())
def test_a_damaged_stream_is_refused_or_understood(pieces: list[bytes]) -> None:
    check_stream(pieces)


@settings(quick, max_examples=150)
@given(st.binary(max_size=200))
def test_noise_is_refused(noise: bytes) -> None:
    check_frame(noise)
    check_stream([noise])


@pytest.mark.slow
@thorough
@given(damaged_frames())
def test_thousands_of_damaged_frames_are_refused_or_understood(frame: bytes) -> None:
    check_frame(frame)


@pytest.mark.slow
@thorough
@given(damaged_streams())
def test_thousands_of_damaged_streams_are_refused_or_understood(pieces: list[bytes]) -> None:
    check_stream(pieces)
