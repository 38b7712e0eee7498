"""One connection between two of our processes, for a process without an event loop: the worker, between engine steps.

`send` never waits for the peer: what the socket does not take now goes out with the next `send`, `flush` or `receive`, and
a peer that leaves too much unread is cut off. `receive` waits only as long as it is told. Knows no meaning of any message.
"""

from __future__ import annotations

import os
import select
import socket
import time
from collections import deque

from chimera.errors import ProtocolError
from chimera.wire.address import MAX_UNSENT_BYTES, Address
from chimera.wire.codec import FrameReader, Message, encode

_READ_BYTES = 1 << 18


class BlockingChannel:
    """A connected stream socket that speaks in messages. Use `connect`, or wrap a socket that was accepted."""

    def __init__(self, connection: socket.socket) -> None:
        connection.setblocking(False)
        self._socket = connection
        self._reader = FrameReader()
        self._outgoing: deque[memoryview] = deque()
        self._unsent_bytes = 0
        self._closed = False
        self._read_out = False
        self._fault: ProtocolError | None = None

    @classmethod
    def connect(cls, address: Address) -> BlockingChannel:
        """Raises OSError when nobody listens there."""
        family = socket.AF_INET if isinstance(address, tuple) else socket.AF_UNIX
        connection = socket.socket(family, socket.SOCK_STREAM)
        try:
            connection.connect(address if isinstance(address, tuple) else os.fspath(address))
        except OSError:
            connection.close()
            raise
        return cls(connection)

    @property
    def closed(self) -> bool:
        """What is sent is dropped; what came before may still be received. The descriptor stays until `close`."""
        return self._closed

    @property
    def fault(self) -> ProtocolError | None:
        """What broke the contract, if that is how the connection ended."""
        return self._fault

    @property
    def unsent_bytes(self) -> int:
        """Above zero, poll for writing too and `flush` when the socket takes more."""
        return self._unsent_bytes

    def fileno(self) -> int:
        return self._socket.fileno()

    def send(self, message: Message) -> None:
        """Hand the message over. After the end it is dropped."""
        if self._closed:
            return
        frame = memoryview(encode(message))
        self._outgoing.append(frame)
        self._unsent_bytes += len(frame)
        self.flush()
        if self._unsent_bytes > MAX_UNSENT_BYTES:
            self._end(ProtocolError(f"the peer leaves more than {MAX_UNSENT_BYTES} bytes unread; it is cut off"))

    def flush(self) -> None:
        """Write what the socket takes, without waiting."""
        while self._outgoing:
            frame = self._outgoing[0]
            try:
                sent = self._socket.send(frame)
            except BlockingIOError:
                return
            except OSError:  # the peer is gone; what it sent before that may still be read
                self._closed = True
                self._forget_outgoing()
                return
            self._unsent_bytes -= sent
            if sent < len(frame):
                self._outgoing[0] = frame[sent:]
                return
            self._outgoing.popleft()

    def receive(self, timeout_s: float | None = 0.0) -> list[Message]:
        """Every message that is there, after waiting up to `timeout_s` for the first (`None`: until there is one).

        Returns nothing, at once, when the connection has ended; `closed` says so, and `fault` why if the peer broke it.
        """
        deadline_s = None if timeout_s is None else time.monotonic() + timeout_s
        while True:
            self.flush()
            messages = [] if self._read_out else self._read()
            if messages or self._read_out or timeout_s == 0.0:
                return messages
            left_s = None if deadline_s is None else deadline_s - time.monotonic()
            if left_s is not None and left_s <= 0:
                return []
            self._wait(left_s)

    def close(self) -> None:
        """End the connection and give the descriptor back; what the socket has not taken is lost."""
        self._end(None)
        self._socket.close()

    def _read(self) -> list[Message]:
        messages: list[Message] = []
        try:
            while True:
                data = self._socket.recv(_READ_BYTES)
                if not data:
                    self._reader.close()
                    self._end(None)
                    break
                messages.extend(self._reader.feed(data))
                if len(data) < _READ_BYTES:
                    break
        except BlockingIOError:
            pass
        except ConnectionError:
            self._end(None)
        except ProtocolError as fault:
            self._end(fault)
        return messages

    def _wait(self, left_s: float | None) -> None:
        poll = select.poll()
        poll.register(self._socket, select.POLLIN | (select.POLLOUT if self._outgoing else 0))
        poll.poll(None if left_s is None else left_s * 1000)

    def _end(self, fault: ProtocolError | None) -> None:
        self._closed = self._read_out = True
        self._fault = fault or self._fault
        self._forget_outgoing()

    def _forget_outgoing(self) -> None:
        self._outgoing.clear()
        self._unsent_bytes = 0
