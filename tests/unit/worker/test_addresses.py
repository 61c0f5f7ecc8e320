"""Control addresses: loopback, or keys; and what others are told."""

import pytest

from disagg.config import WorkerConfig
from disagg.errors import ConfigError
from disagg.worker.addresses import advertised_address, check_addresses, http_url, is_local

LOOPBACK = [
    "tcp://127.0.0.1:5600",
    "tcp://127.8.9.1:0",
    "tcp://127.0.0.1:*",
    "tcp://localhost:1",
    "tcp://[::1]:5600",
    "ipc:///run/disagg/w.sock",
]
REACHABLE = [
    "tcp://0.0.0.0:5600",
    "tcp://*:5600",
    "tcp://10.0.0.1:5600",
    "tcp://[::]:5600",
    "tcp://example.com:5600",
    "tcp://127.0.0.1.example.com:5600",
]
NONE = ["tcp://127.0.0.1", "tcp://127.0.0.1:port", "tcp://127.0.0.1:70000", "udp://127.0.0.1:1"]
NONE += ["127.0.0.1:5600", "ipc://", ""]


@pytest.mark.parametrize("address", LOOPBACK)
def test_loopback_and_ipc_are_accepted(address: str) -> None:
    check_addresses(WorkerConfig(control=address))


@pytest.mark.parametrize("address", REACHABLE + NONE)
def test_everything_else_is_refused_by_name(address: str) -> None:
    """Without keys an address that others can reach is an open door."""
    with pytest.raises(ConfigError, match="control must"):
        check_addresses(WorkerConfig(control=address))


@pytest.mark.parametrize("address", LOOPBACK + REACHABLE)
def test_with_keys_every_address_is_accepted(address: str) -> None:
    check_addresses(WorkerConfig(control=address, transport_keys="/keys", advertise_host="10.0.0.1"))


@pytest.mark.parametrize("address", NONE)
def test_keys_make_no_address_of_what_is_none(address: str) -> None:
    with pytest.raises(ConfigError, match="control must"):
        check_addresses(WorkerConfig(control=address, transport_keys="/keys"))


@pytest.mark.parametrize("host", ["0.0.0.0", "[::]", "*"])
def test_every_interface_needs_a_name_that_others_can_use(host: str) -> None:
    with pytest.raises(ConfigError, match="advertise_host is needed"):
        check_addresses(WorkerConfig(control=f"tcp://{host}:1", transport_keys="/keys"))
    with pytest.raises(ConfigError, match="advertise_host must be one address"):
        check_addresses(WorkerConfig(control=f"tcp://{host}:1", transport_keys="/keys", advertise_host=host))


def test_nobody_is_sent_off_this_machine_without_keys() -> None:
    with pytest.raises(ConfigError, match="advertise_host must be a loopback address without"):
        check_addresses(WorkerConfig(advertise_host="10.0.0.1"))


def test_others_are_told_the_advertised_host_with_the_bound_port() -> None:
    assert advertised_address("tcp://0.0.0.0:5600", "10.0.0.1") == "tcp://10.0.0.1:5600"
    assert advertised_address("tcp://[::]:5600", "fd00::2") == "tcp://[fd00::2]:5600"
    assert advertised_address("tcp://10.0.0.1:5600", None) == "tcp://10.0.0.1:5600"
    assert advertised_address("ipc:///x.sock", "10.0.0.1") == "ipc:///x.sock"


def test_the_metrics_url_names_a_host_that_can_be_reached() -> None:
    assert http_url("127.0.0.1", 80, "10.0.0.1") == "http://127.0.0.1:80"
    assert http_url("0.0.0.0", 80, "10.0.0.1") == "http://10.0.0.1:80"
    assert http_url("::", 80, "fd00::2") == "http://[fd00::2]:80"
    assert http_url("::1", 80, None) == "http://[::1]:80"
    assert http_url("0.0.0.0", 80, None) == "http://127.0.0.1:80"


@pytest.mark.parametrize(
    ("control", "advertise_host", "expected"),
    [
        ("ipc:///x.sock", None, True),
        ("tcp://127.0.0.1:1", None, True),
        ("tcp://0.0.0.0:1", "127.0.0.1", True),
        ("tcp://10.0.0.1:1", None, False),
        ("tcp://0.0.0.0:1", "10.0.0.1", False),
        ("tcp://[::]:1", "fd00::2", False),
        ("tcp://0.0.0.0:1", "worker.example.com", False),
    ],
)
def test_kv_stays_on_loopback_where_the_worker_does(
    control: str, advertise_host: str | None, expected: bool
) -> None:
    assert is_local(WorkerConfig(control=control, advertise_host=advertise_host)) is expected
