"""What stays on this machine."""

import pytest

from disagg.errors import ConfigError
from disagg.security import choice_for, host_of, host_port, is_loopback, is_own_call, is_wildcard
from disagg.security.addresses import may_be_ipv6


def test_hosts_of_addresses() -> None:
    assert host_of("tcp://10.0.0.1:5600") == "10.0.0.1"
    assert host_of("tcp://[::1]:5600") == "::1"
    assert host_of("ipc:///run/x.sock") is None


def test_an_ipv6_host_is_in_brackets_before_a_port() -> None:
    assert host_port("10.0.0.1", 5600) == "10.0.0.1:5600"
    assert host_port("chat-router", "*") == "chat-router:*"
    assert host_port("fd00::2", 5600) == host_port("[fd00::2]", 5600) == "[fd00::2]:5600"


def test_sockets_speak_ipv6_where_they_may_have_to() -> None:
    """A name's addresses may be of either family, and an IPv4 socket finds nobody behind an IPv6 one."""
    assert all(map(may_be_ipv6, ("tcp://[fd00::2]:1", "tcp://*:1", "tcp://chat-decode-0.chat-decode:1")))
    assert not any(map(may_be_ipv6, ("tcp://10.0.0.1:1", "tcp://localhost:1", "ipc:///run/x.sock")))


def test_loopback_is_known_in_every_notation() -> None:
    assert all(map(is_loopback, ("localhost", "127.8.9.1", "::1", "[::1]", "::ffff:127.0.0.1")))
    assert not any(
        map(is_loopback, ("::ffff:10.0.0.1", "testclient", "127.0.0.1.example.com", "0.0.0.0", ""))
    )


def test_wildcards_are_no_address() -> None:
    assert all(map(is_wildcard, ("0.0.0.0", "::", "[::]", "*")))
    assert not any(map(is_wildcard, ("127.0.0.1", "10.0.0.1", "example.com", "")))


def test_without_keys_nothing_leaves_the_machine() -> None:
    assert choice_for(None, "ipc:///run/x.sock") is None
    assert choice_for(None, "tcp://127.0.0.1:1") is None
    with pytest.raises(ConfigError, match=r"transport_keys are needed .* 'tcp://10.0.0.1:1'"):
        choice_for(None, "tcp://10.0.0.1:1")


@pytest.mark.parametrize(
    ("host", "headers", "own"),
    [
        ("127.0.0.1", {}, True),
        ("::1", {"host": "127.0.0.1:8080"}, True),
        ("10.0.0.1", {}, False),
        (None, {}, False),
        ("127.0.0.1", {"origin": "https://example.com"}, False),
        ("127.0.0.1", {"origin": "null"}, False),
    ],
)
def test_a_page_in_a_browser_of_this_machine_is_not_its_own_call(
    host: str | None, headers: dict[str, str], own: bool
) -> None:
    assert is_own_call(host, headers) is own
