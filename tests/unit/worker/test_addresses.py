"""Control addresses: loopback or nothing."""

import pytest

from disagg.errors import ConfigError
from disagg.worker.addresses import check_control_address, is_loopback


@pytest.mark.parametrize(
    "address",
    [
        "tcp://127.0.0.1:5600",
        "tcp://127.8.9.1:0",
        "tcp://127.0.0.1:*",
        "tcp://localhost:1",
        "tcp://[::1]:5600",
        "ipc:///run/disagg/w.sock",
    ],
)
def test_loopback_and_ipc_are_accepted(address: str) -> None:
    check_control_address(address)


@pytest.mark.parametrize(
    "address",
    [
        "tcp://0.0.0.0:5600",
        "tcp://*:5600",
        "tcp://10.0.0.1:5600",
        "tcp://[::]:5600",
        "tcp://example.com:5600",
        "tcp://127.0.0.1.example.com:5600",
        "tcp://127.0.0.1",
        "tcp://127.0.0.1:port",
        "tcp://127.0.0.1:70000",
        "udp://127.0.0.1:1",
        "127.0.0.1:5600",
        "ipc://",
        "",
    ],
)
def test_everything_else_is_refused_by_name(address: str) -> None:
    """The links carry no keys yet, so an address that others can reach is an open door."""
    with pytest.raises(ConfigError, match="control must"):
        check_control_address(address)


def test_ipv4_peer_of_a_dual_stack_listener_is_loopback() -> None:
    assert is_loopback("::ffff:127.0.0.1")
    assert not is_loopback("::ffff:10.0.0.1")
    assert not is_loopback("testclient")
