"""The port of a server: one server's alone from before anybody listens on it, and free again after its end."""

from __future__ import annotations

import socket

import pytest
from chimera.cli import port
from chimera.errors import ConfigError

HERE = "127.0.0.1"


def test_two_servers_that_start_at_once_do_not_share_a_port() -> None:
    with (
        port.reserve(HERE, 0) as number,
        pytest.raises(ConfigError, match="Address already in use"),
        port.reserve(HERE, number),
    ):
        pass


def test_a_port_is_free_again_when_its_server_has_ended() -> None:
    with port.reserve(HERE, 0) as first:
        pass
    with port.reserve(HERE, first) as second:
        assert second == first


def test_a_front_end_listens_on_the_port_that_is_held_for_it() -> None:
    with port.reserve(HERE, 0) as number, socket.socket() as front:
        front.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        front.bind((HERE, number))
        front.listen()
        with socket.create_connection((HERE, number), timeout=5.0) as client:
            assert client.getpeername() == front.getsockname()


def test_a_port_somebody_listens_on_is_refused() -> None:
    with socket.create_server((HERE, 0)) as other:
        number = other.getsockname()[1]
        with pytest.raises(ConfigError, match=f"cannot listen on {HERE}:{number}"), port.reserve(HERE, number):
            pass


@pytest.mark.parametrize("number", [-1, 65536, 99999])
def test_a_number_that_is_no_port_is_refused(number: int) -> None:
    with pytest.raises(ConfigError, match=f"{number} is no port"), port.reserve(HERE, number):
        pass
