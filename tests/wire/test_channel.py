"""Channels over real sockets: order, ends, faults, slow peers; the blocking kind against the looping kind."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import socket
import struct
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from chimera.core.request import Request
from chimera.errors import ProtocolError
from chimera.msg.stream import Cancel, Enqueue, Hello
from chimera.wire import blocking
from chimera.wire import channel as channels
from chimera.wire.blocking import BlockingChannel
from chimera.wire.channel import Channel, Server, connect, serve
from chimera.wire.codec import Message, encode

HELLO = Hello(role="cli", name="test", pid=1)


def cancels(count: int) -> list[Message]:
    return [Cancel(request_id=f"r{i}") for i in range(count)]


def bulky(nbytes: int) -> Enqueue:
    request = Request(request_id="r", model="m", front="f", prompt_tokens=1, max_tokens=1, arrived_s=0.0)
    return Enqueue(request=request, payload=bytes(nbytes))


class Host:
    """Listens, keeps every channel that comes in, and counts what arrives."""

    def __init__(self) -> None:
        self.channels: asyncio.Queue[Channel] = asyncio.Queue()
        self.server: Server | None = None

    async def keep(self, channel: Channel) -> None:
        self.channels.put_nowait(channel)
        await channel.wait_closed()

    async def next(self) -> Channel:
        return await asyncio.wait_for(self.channels.get(), 5)


@pytest.fixture
async def host(tmp_path: Path) -> AsyncIterator[Host]:
    host = Host()
    host.server = await serve(tmp_path / "s.sock", host.keep)
    yield host
    await host.server.close()


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "s.sock"


async def read_all(channel: Channel) -> list[Message]:
    return [message async for message in channel]


async def test_messages_arrive_in_order_and_the_close_ends_the_reading(host: Host, path: Path) -> None:
    near = await connect(path)
    far = await host.next()
    for message in cancels(5000):
        near.send(message)
    near.close()
    assert await read_all(far) == cancels(5000)


async def test_both_directions_share_a_channel(host: Host, path: Path) -> None:
    near = await connect(path)
    far = await host.next()
    far.send(HELLO)
    assert await anext(near) == HELLO
    near.send(HELLO)
    assert await anext(far) == HELLO
    near.close()


async def test_a_tcp_address_serves_as_well() -> None:
    host = Host()
    server = await serve(("127.0.0.1", 0), host.keep)
    near = await connect(server.address)
    near.send(HELLO)
    near.close()
    assert await read_all(await host.next()) == [HELLO]
    await server.close()


async def test_direct_delivery_gets_what_came_before_it_asked_and_one_end(host: Host, path: Path) -> None:
    near = await connect(path)
    far = await host.next()
    near.send(HELLO)
    assert await anext(far) == HELLO
    near.send(HELLO)
    got: list[Message] = []
    ended = asyncio.get_running_loop().create_future()
    far.deliver_to(got.append, ended.set_result)
    near.send(Cancel(request_id="r"))
    near.close()
    assert await asyncio.wait_for(ended, 5) is None
    assert got == [HELLO, Cancel(request_id="r")]
    late: list[object] = []
    far.deliver_to(got.append, late.append)
    assert late == [None]


async def test_a_plain_handler_may_take_the_channel(tmp_path: Path) -> None:
    got: asyncio.Queue[Message] = asyncio.Queue()
    server = await serve(tmp_path / "p.sock", lambda channel: channel.deliver_to(got.put_nowait))
    near = await connect(tmp_path / "p.sock")
    near.send(HELLO)
    assert await asyncio.wait_for(got.get(), 5) == HELLO
    near.close()
    await server.close()


@pytest.mark.parametrize(
    ("bytes_sent", "said"),
    [
        (b"GET / HTTP/1.1\r\n\r\n", "not ours"),
        (struct.pack("<2sHI", b"Ch", 9, 0), "version 9"),
        (struct.pack("<2sHI", b"Ch", 1, 1 << 30), "longer than a frame"),
        (struct.pack("<2sHI", b"Ch", 1, 3) + b"\xc1\xc1\xc1", "does not hold a message"),
        (encode(HELLO) + encode(HELLO)[:-1], "bytes into a frame"),
    ],
    ids=["foreign", "version", "length", "body", "cut short"],
)
async def test_a_broken_peer_is_dropped_and_the_others_stay(
    host: Host, path: Path, bytes_sent: bytes, said: str, caplog: pytest.LogCaptureFixture
) -> None:
    good = await connect(path)
    far_good = await host.next()
    _, writer = await asyncio.open_unix_connection(path)
    far_bad = await host.next()
    with caplog.at_level(logging.WARNING, "chimera.wire"):
        writer.write(bytes_sent)
        writer.write_eof()
        with pytest.raises(ProtocolError, match=said):
            await read_all(far_bad)
    writer.close()
    with contextlib.suppress(ConnectionError):
        await writer.wait_closed()
    good.send(HELLO)
    assert await anext(far_good) == HELLO
    assert said in caplog.text
    good.close()


async def test_direct_delivery_is_handed_the_fault(host: Host, path: Path) -> None:
    _, writer = await asyncio.open_unix_connection(path)
    far = await host.next()
    ended: asyncio.Future[ProtocolError | None] = asyncio.get_running_loop().create_future()
    got: list[Message] = []
    far.deliver_to(got.append, ended.set_result)
    writer.write(encode(HELLO) + b"garbage!")
    assert isinstance(await asyncio.wait_for(ended, 5), ProtocolError)
    assert got == [HELLO]
    writer.close()


async def test_a_peer_that_never_reads_is_cut_off(host: Host, path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(channels, "MAX_UNSENT_BYTES", 1 << 20)
    silent = socket.socket(socket.AF_UNIX)
    silent.connect(str(path))
    far = await host.next()
    for _ in range(4):
        far.send(bulky(1 << 19))
    await asyncio.wait_for(far.wait_closed(), 5)
    assert isinstance(far.fault, ProtocolError)
    assert "unread" in str(far.fault)
    far.send(HELLO)  # nobody is there; the end has been told already
    silent.close()


async def test_a_reader_that_is_behind_holds_the_sender_and_loses_nothing(host: Host, path: Path) -> None:
    near = await connect(path)
    far = await host.next()
    count = 20_000
    for message in cancels(count):
        near.send(message)
    near.close()
    got = 0
    async for message in far:
        assert message == Cancel(request_id=f"r{got}")
        got += 1
        assert len(far._arrived) < count
    assert got == count


async def test_closing_the_server_ends_its_channels_and_leaves_no_socket(tmp_path: Path) -> None:
    host = Host()
    server = await serve(tmp_path / "c.sock", host.keep)
    near = await connect(tmp_path / "c.sock")
    await host.next()
    await server.close()
    assert await asyncio.wait_for(read_all(near), 5) == []
    assert not (tmp_path / "c.sock").exists()


async def test_a_socket_left_by_a_dead_process_is_taken_over(tmp_path: Path) -> None:
    left = socket.socket(socket.AF_UNIX)
    left.bind(str(tmp_path / "d.sock"))
    left.close()
    host = Host()
    server = await serve(tmp_path / "d.sock", host.keep)
    near = await connect(tmp_path / "d.sock")
    await host.next()
    near.close()
    await server.close()


async def test_connecting_to_nobody_is_an_os_error(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        await connect(tmp_path / "nobody.sock")


async def test_the_blocking_kind_speaks_with_the_looping_kind(host: Host, path: Path) -> None:
    worker = BlockingChannel.connect(path)
    agent = await host.next()
    worker.send(HELLO)
    assert await anext(agent) == HELLO
    assert worker.receive(0.0) == []
    for message in cancels(3000):
        agent.send(message)
    agent.close()
    got: list[Message] = []

    def drain() -> None:
        while not worker.closed:
            got.extend(worker.receive(None))

    await asyncio.wait_for(asyncio.to_thread(drain), 5)
    assert got == cancels(3000)
    worker.close()


def test_a_blocking_receive_waits_only_as_long_as_told() -> None:
    ours, theirs = socket.socketpair()
    worker, agent = BlockingChannel(ours), BlockingChannel(theirs)
    assert worker.receive(0.01) == []
    agent.send(HELLO)
    assert worker.receive(None) == [HELLO]
    worker.close()
    agent.close()


def test_a_blocking_send_never_waits_and_catches_up_later() -> None:
    ours, theirs = socket.socketpair()
    worker, agent = BlockingChannel(ours), BlockingChannel(theirs)
    sent = 300
    for _ in range(sent):
        worker.send(bulky(1 << 14))
    assert worker.unsent_bytes > 0
    got = 0
    while got < sent:
        got += len(agent.receive(0.0))
        worker.flush()
    assert worker.unsent_bytes == 0
    worker.close()
    assert agent.receive(None) == []
    assert agent.closed
    assert agent.fileno() >= 0
    agent.close()


def test_a_blocking_send_cuts_off_a_peer_that_never_reads(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(blocking, "MAX_UNSENT_BYTES", 1 << 20)
    ours, theirs = socket.socketpair()
    worker = BlockingChannel(ours)
    for _ in range(4):
        worker.send(bulky(1 << 19))
    assert worker.closed
    assert "unread" in str(worker.fault)
    worker.close()
    theirs.close()


def test_a_blocking_channel_survives_a_peer_that_is_gone() -> None:
    ours, theirs = socket.socketpair()
    worker, agent = BlockingChannel(ours), BlockingChannel(theirs)
    agent.send(HELLO)
    agent.close()
    worker.send(HELLO)
    assert worker.closed  # a sender that never receives learns of the end too
    assert worker.receive(None) == [HELLO]
    assert worker.receive(None) == []
    assert worker.closed
    worker.close()


def test_a_blocking_channel_names_a_broken_frame() -> None:
    ours, theirs = socket.socketpair()
    worker = BlockingChannel(ours)
    theirs.sendall(encode(HELLO) + b"garbage!")
    assert worker.receive(None) == [HELLO]
    assert worker.receive(None) == []
    assert "not ours" in str(worker.fault)
    worker.close()
    theirs.close()
