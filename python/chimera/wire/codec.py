"""Messages to frames and back.

A frame is a header (magic, version, length) and a msgpack body that names its message by tag. Whatever does not keep to
this (a foreign magic, another version, an unknown tag, a wrong type, a body too long or cut short) is a `ProtocolError`.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from typing import Any, get_args

import msgspec

from chimera.errors import ProtocolError
from chimera.msg import actions, events, stream

Message = (
    events.ModelRegistered
    | events.ModelRemoved
    | events.PlacementChanged
    | events.RequestArrived
    | events.RequestCancelled
    | events.RequestFinished
    | events.AgentJoined
    | events.AgentLost
    | events.ReplicaFound
    | events.ReplicaReady
    | events.ReplicaStopped
    | events.ActivationFailed
    | events.WorkerLost
    | events.PagesWanted
    | events.PagesReturned
    | events.PagesHeld
    | events.PagesKept
    | events.PolicyChosen
    | events.LoadWanted
    | events.UnloadWanted
    | events.ResizeWanted
    | events.GpuSampled
    | events.GpuLost
    | events.RoomChanged
    | events.StepsTimed
    | events.Woke
    | actions.Activate
    | actions.Deactivate
    | actions.Resize
    | actions.Pause
    | actions.Resume
    | actions.Grant
    | actions.Recall
    | actions.Route
    | actions.Admit
    | actions.Preempt
    | actions.QueueBy
    | actions.Abort
    | actions.Requeue
    | actions.Reject
    | actions.WakeAt
    | stream.Hello
    | stream.Enqueue
    | stream.Delivery
    | stream.Cancel
    | stream.FrontLost
    | stream.Submit
    | stream.Standing
    | stream.Tokens
    | stream.Failed
    | stream.Heartbeat
    | stream.Ping
    | stream.Pong
    | stream.Fork
    | stream.Forked
    | stream.Prepare
    | stream.Prepared
    | stream.LetGo
    | stream.LedgerTold
    | stream.ReplicaNews
    | stream.StandingWanted
    | stream.StandingTold
    | stream.ReloadWanted
    | stream.EntryFiled
    | stream.Refiled
    | stream.Flush
    | stream.Flushed
    | stream.RequestTold
    | stream.TallyTold
    | stream.EntriesTold
    | stream.MeasuresWanted
    | stream.MeasuresTaken
    | stream.SnapshotWanted
    | stream.SnapshotTaken
    | stream.SightWanted
    | stream.SightTaken
    | stream.PastWanted
    | stream.PastTaken
    | stream.Stop
)

VERSION = 1
MAX_BODY = 64 << 20
"""A million prompt tokens fit many times; anything longer is a fault, not a message."""

_MAGIC = b"Ch"
_HEADER = struct.Struct("<2sHI")
_encoder = msgspec.msgpack.Encoder()
_decoder: msgspec.msgpack.Decoder[Any] = msgspec.msgpack.Decoder(Message)
_known: tuple[type, ...] = get_args(Message)


def encode(message: Message) -> bytes:
    """One message as one frame."""
    frame = bytearray(_HEADER.size)
    _encoder.encode_into(message, frame, _HEADER.size)
    length = len(frame) - _HEADER.size
    if length > MAX_BODY:
        raise ProtocolError(f"a {type(message).__name__} of {length} bytes is longer than a frame may be ({MAX_BODY})")
    _HEADER.pack_into(frame, 0, _MAGIC, VERSION, length)
    return bytes(frame)


def decode(frame: bytes | bytearray | memoryview) -> Message:
    """Exactly one frame, whole."""
    length = _body_length(frame)
    if len(frame) != _HEADER.size + length:
        raise ProtocolError(f"the frame says {length} bytes of body and has {len(frame) - _HEADER.size}")
    return _decode_body(memoryview(frame)[_HEADER.size :])


class FrameReader:
    """Cuts a byte stream into messages: feed it what the socket gave, take what is whole."""

    def __init__(self) -> None:
        self._buffer = bytearray()

    def feed(self, data: bytes | bytearray | memoryview) -> Iterator[Message]:
        """The messages that `data` completes. Raises at the first frame that breaks the contract."""
        self._buffer += data
        start = 0
        try:
            while (body := start + _HEADER.size) <= len(self._buffer):
                end = body + _body_length(self._buffer, start)
                if end > len(self._buffer):
                    break
                start = end
                # A copy, because a view that is still held would keep the buffer from shrinking.
                yield _decode_body(self._buffer[body:end])
        finally:
            del self._buffer[:start]

    def close(self) -> None:
        """The stream has ended; a frame cut short is a fault."""
        if self._buffer:
            raise ProtocolError(f"the connection ended {len(self._buffer)} bytes into a frame")


def _body_length(frames: bytes | bytearray | memoryview, start: int = 0) -> int:
    if len(frames) - start < _HEADER.size:
        raise ProtocolError(f"a frame of {len(frames) - start} bytes is shorter than its header")
    magic, version, length = _HEADER.unpack_from(frames, start)
    if magic != _MAGIC:
        raise ProtocolError(f"a frame that starts with {magic!r} is not ours")
    if version != VERSION:
        raise ProtocolError(f"the peer speaks version {version} and we speak {VERSION}; both ends must be one release")
    if length > MAX_BODY:
        raise ProtocolError(f"a frame of {length} bytes is longer than a frame may be ({MAX_BODY})")
    return int(length)


def _decode_body(body: bytes | bytearray | memoryview) -> Message:
    try:
        message: Message = _decoder.decode(body)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as fault:
        raise ProtocolError(f"a frame does not hold a message we know: {fault}") from None
    return message
