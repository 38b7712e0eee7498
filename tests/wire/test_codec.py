"""Frames: every message comes back as it was, and whatever is not a frame of ours is refused with the reason."""

from __future__ import annotations

import struct
from itertools import pairwise

import msgspec
import pytest
from chimera.core.replica import Epoch, ReplicaId
from chimera.core.request import Request
from chimera.errors import ProtocolError
from chimera.msg import actions, events, stream
from chimera.msg.stream import Cancel, Enqueue, Hello, Tokens
from chimera.wire import codec
from chimera.wire.codec import MAX_BODY, VERSION, FrameReader, Message, decode, encode
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.wire.messages import KINDS, message, messages

calm = settings(deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow])
"""Other work on the machine must not fail a test; what is drawn is the same every time."""

HEADER_BYTES = 8
CANCEL = encode(Cancel(request_id="r"))
NO_DELTAS = encode(Tokens(replica=ReplicaId("m"), epoch=Epoch(1, 1), deltas=[]))[HEADER_BYTES:]


def sealed(body: bytes, magic: bytes = b"Ch", version: int = VERSION, length: int | None = None) -> bytes:
    """`body` behind a header that says what the test wants it to say."""
    return struct.pack("<2sHI", magic, version, len(body) if length is None else length) + body


def read(reader: FrameReader, *chunks: bytes) -> list[Message]:
    return [found for chunk in chunks for found in reader.feed(chunk)]


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)
def test_every_kind_of_message_comes_back_as_it_was(kind: type) -> None:
    @settings(calm, max_examples=12)
    @given(message(kind))
    def comes_back(sent: Message) -> None:
        received = decode(encode(sent))
        assert type(received) is kind
        assert received == sent

    comes_back()


def test_every_event_action_and_stream_message_may_cross() -> None:
    declared = {
        kind
        for root in (events.Event, actions.Action, stream.Stream)
        for kind in root.__subclasses__()
        if kind.__module__.startswith("chimera.")
    }
    assert declared == set(KINDS)


def test_a_frame_is_a_header_of_eight_bytes_and_its_body() -> None:
    assert sealed(msgspec.msgpack.encode({"type": "Cancel", "request_id": "r"})) == CANCEL


def test_fields_a_newer_peer_added_are_passed_over() -> None:
    body = msgspec.msgpack.encode({"type": "Cancel", "request_id": "r", "mood": "new"})
    assert decode(sealed(body)) == Cancel(request_id="r")


def test_the_frame_may_be_any_kind_of_bytes() -> None:
    assert decode(bytearray(CANCEL)) == decode(memoryview(CANCEL)) == Cancel(request_id="r")


REFUSED = {
    "nothing": (b"", "shorter than its header"),
    "half a header": (CANCEL[:5], "shorter than its header"),
    "foreign magic": (sealed(b"", magic=b"GE"), "starts with b'GE' is not ours"),
    "older version": (sealed(CANCEL[HEADER_BYTES:], version=VERSION - 1), f"version {VERSION - 1} and we speak {VERSION}"),
    "newer version": (sealed(CANCEL[HEADER_BYTES:], version=VERSION + 1), "both ends must be one release"),
    "cut short": (CANCEL[:-1], "bytes of body and has"),
    "too much": (CANCEL + b"\0", "bytes of body and has"),
    "oversized": (sealed(b"", length=MAX_BODY + 1), "longer than a frame may be"),
    "empty body": (sealed(b""), "truncated"),
    "two bodies": (sealed(CANCEL[HEADER_BYTES:] * 2), "trailing characters"),
    "unknown tag": (sealed(msgspec.msgpack.encode({"type": "Bribe"})), "Invalid value 'Bribe'"),
    "no tag": (sealed(msgspec.msgpack.encode({"request_id": "r"})), "missing required field `type`"),
    "not a map": (sealed(msgspec.msgpack.encode(["Cancel", "r"])), "Expected `object`, got `array`"),
    "missing field": (sealed(msgspec.msgpack.encode({"type": "Cancel"})), "missing required field `request_id`"),
    "wrong type": (sealed(msgspec.msgpack.encode({"type": "Cancel", "request_id": 5})), "Expected `str`, got `int`"),
    "not text": (sealed(b"\x82\xa4type\xa6Cancel\xaarequest_id\xa1\xff"), "invalid start byte"),
    "too deep": (sealed(b"\x82\xa4type\xa6Cancel\xa1x" + b"\x91" * 100_000), "recursion depth"),
    "four billion deltas": (sealed(NO_DELTAS.replace(b"deltas\x90", b"deltas\xdd\xff\xff\xff\xff")), "truncated"),
    "four billion items": (sealed(b"\x82\xa4type\xa6Cancel\xa1x\xdd\xff\xff\xff\xff"), "truncated"),
    "four billion letters": (sealed(b"\x82\xa4type\xa6Cancel\xaarequest_id\xdb\xff\xff\xff\xff"), "truncated"),
}


@pytest.mark.parametrize(("frame", "reason"), REFUSED.values(), ids=REFUSED.keys())
def test_what_is_not_a_frame_of_ours_is_refused_with_the_reason(frame: bytes, reason: str) -> None:
    with pytest.raises(ProtocolError) as refusal:
        decode(frame)
    assert reason in str(refusal.value)


def test_a_message_too_long_for_a_frame_is_not_sent(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(codec, "MAX_BODY", 40)  # the real bound would cost the test 64 MiB
    assert encode(Cancel(request_id="r"))
    with pytest.raises(ProtocolError, match=r"a Cancel of \d+ bytes is longer than a frame may be \(40\)"):
        encode(Cancel(request_id="r" * 40))


def test_a_payload_crosses_as_the_bytes_it_is() -> None:
    request = Request(request_id="r", model="m", front="f", prompt_tokens=1, max_tokens=1, arrived_s=0.5)
    payload = bytes(range(256))
    frame = encode(Enqueue(request=request, payload=payload))
    assert payload in frame, "the dispatcher passes it on; nobody escapes or copies it into another form"
    received = decode(frame)
    assert isinstance(received, Enqueue)
    assert received.payload == payload


def test_a_stream_fed_byte_by_byte_gives_each_message_when_it_is_whole() -> None:
    sent: list[Message] = [Hello(role="cli", name="x", pid=1), Cancel(request_id="a"), Cancel(request_id="b")]
    reader = FrameReader()
    arrivals = []
    for at, byte in enumerate(b"".join(map(encode, sent)), start=1):
        arrivals += [(at, found) for found in reader.feed(bytes([byte]))]
    ends = [sum(len(encode(m)) for m in sent[: i + 1]) for i in range(len(sent))]
    assert arrivals == list(zip(ends, sent, strict=True))
    reader.close()


@settings(calm, max_examples=60)
@given(st.lists(messages(), max_size=6), st.lists(st.floats(0, 1), max_size=12))
def test_however_a_stream_is_cut_it_gives_the_same_messages(sent: list[Message], cuts: list[float]) -> None:
    whole = b"".join(map(encode, sent))
    places = [0, *sorted(round(cut * len(whole)) for cut in cuts), len(whole)]
    reader = FrameReader()
    assert read(reader, *(whole[a:b] for a, b in pairwise(places))) == sent
    reader.close()


def test_messages_before_a_broken_frame_are_delivered() -> None:
    reader = FrameReader()
    arriving = reader.feed(CANCEL + CANCEL + b"GET / HTTP/1.1")
    assert [next(arriving), next(arriving)] == [Cancel(request_id="r")] * 2
    with pytest.raises(ProtocolError, match="not ours"):
        next(arriving)


def test_a_reader_left_in_the_middle_gives_the_rest_next_time() -> None:
    reader = FrameReader()
    for _ in reader.feed(CANCEL * 3):
        break
    assert read(reader, b"") == [Cancel(request_id="r")] * 2


def test_a_foreign_peer_is_refused_at_its_first_whole_header() -> None:
    reader = FrameReader()
    assert read(reader, b"GET / H") == []
    with pytest.raises(ProtocolError, match="starts with b'GE'"):
        read(reader, b"T")


def test_an_oversized_frame_is_refused_before_its_body_is_awaited() -> None:
    with pytest.raises(ProtocolError, match="longer than a frame may be"):
        read(FrameReader(), sealed(b"", length=MAX_BODY + 1))


@pytest.mark.parametrize("cut", [1, HEADER_BYTES, len(CANCEL) - 1])
def test_a_stream_that_ends_inside_a_frame_is_a_fault(cut: int) -> None:
    reader = FrameReader()
    assert read(reader, CANCEL, CANCEL[:cut]) == [Cancel(request_id="r")]
    with pytest.raises(ProtocolError, match=f"ended {cut} bytes into a frame"):
        reader.close()
