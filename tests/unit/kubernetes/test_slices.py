"""Which members a set of EndpointSlices means."""

import itertools
from typing import Any

import msgspec
import pytest

from disagg.kubernetes.slices import Conditions, EndpointSlice, members_of
from support.api_server import make_endpoint, make_slice


def read(*slices: dict[str, Any]) -> list[EndpointSlice]:
    return msgspec.convert(list(slices), list[EndpointSlice])


def conditions(*slices: dict[str, Any]) -> dict[str, str]:
    return {address: member.condition for address, member in members_of(read(*slices)).items()}


@pytest.mark.parametrize(
    ("ready", "serving", "terminating", "expected"),
    [
        (None, None, None, "ready"),
        (True, None, None, "ready"),
        (False, None, None, "not_ready"),
        (False, False, False, "not_ready"),
        (False, True, False, "ready"),
        (True, False, None, "ready"),
        (None, False, None, "ready"),
    ],
)
def test_conditions_are_read_as_the_api_documents_them(
    ready: bool | None, serving: bool | None, terminating: bool | None, expected: str
) -> None:
    """What is not said of `ready` is true, of `serving` the same as `ready`, of `terminating` false."""
    assert Conditions(ready, serving, terminating).to_condition() == expected


def test_terminating_outweighs_ready_and_serving() -> None:
    """A terminating pod serves what it has: that it is serving says nothing of new work."""
    for ready, serving in itertools.product((None, True, False), repeat=2):
        assert Conditions(ready, serving, True).to_condition() == "terminating"


def test_a_member_has_the_control_port_of_its_slice() -> None:
    part = make_slice("s", [make_endpoint("10.0.0.7", pod="decode-a")], port=5601)
    (member,) = members_of(read(part)).values()
    assert (member.address, member.pod, member.pod_uid) == ("tcp://10.0.0.7:5601", "decode-a", "uid-decode-a")


@pytest.mark.parametrize(
    "changes",
    [
        {"ports": None},
        {"ports": [{"name": "http", "port": 8080}]},
        {"ports": [{"name": "control"}]},
        {"endpoints": None},
        {"endpoints": []},
        {"endpoints": [{"addresses": []}]},
        {"addressType": "FQDN"},
    ],
)
def test_what_has_no_control_address_is_no_member(changes: dict[str, Any]) -> None:
    """An empty Service has `endpoints: null` and `ports: null`; slices of names are deprecated."""
    assert conditions(make_slice("s", [make_endpoint("10.0.0.7")]) | changes) == {}


def test_other_ports_do_not_hide_the_control_port() -> None:
    ports = [{"name": "http", "port": 8080}, {"name": "control", "port": 5600}]
    part = make_slice("s", [make_endpoint("10.0.0.7")]) | {"ports": ports}
    assert list(conditions(part)) == ["tcp://10.0.0.7:5600"]


def test_ipv6_addresses_are_bracketed() -> None:
    part = make_slice("s", [make_endpoint("fd00::7")], family="IPv6")
    assert list(conditions(part)) == ["tcp://[fd00::7]:5600"]


def test_a_pod_with_two_families_is_one_member_at_its_ipv4_address() -> None:
    """Two links to one process would count its pages twice."""
    four = make_slice("4", [make_endpoint("10.0.0.7", pod="a")])
    six = make_slice("6", [make_endpoint("fd00::7", pod="a")], family="IPv6")
    for slices in ((four, six), (six, four)):
        assert conditions(*slices) == {"tcp://10.0.0.7:5600": "ready"}


def test_a_pod_in_two_slices_is_terminating_if_either_says_so() -> None:
    """While slices are rewritten a pod is in two, and one of them is out of date; it never stops ending."""
    old = make_slice("old", [make_endpoint("10.0.0.7", pod="a")])
    new = make_slice("new", [make_endpoint("10.0.0.7", pod="a", ready=False, terminating=True)])
    for slices in ((old, new), (new, old)):
        assert conditions(*slices) == {"tcp://10.0.0.7:5600": "terminating"}


def test_a_pod_in_two_slices_is_ready_if_either_says_so() -> None:
    one = make_slice("1", [make_endpoint("10.0.0.7", pod="a", ready=False)])
    two = make_slice("2", [make_endpoint("10.0.0.7", pod="a")])
    for slices in ((one, two), (two, one)):
        assert conditions(*slices) == {"tcp://10.0.0.7:5600": "ready"}


def test_an_address_that_is_used_again_belongs_to_the_new_pod() -> None:
    gone = make_slice("1", [make_endpoint("10.0.0.7", pod="a", ready=False, terminating=True)])
    new = make_slice("2", [make_endpoint("10.0.0.7", pod="b", ready=False)])
    for slices in ((gone, new), (new, gone)):
        (member,) = members_of(read(*slices)).values()
        assert (member.pod, member.condition) == ("b", "not_ready")


def test_endpoints_without_a_pod_are_told_apart_by_address() -> None:
    part = make_slice("s", [make_endpoint("10.0.0.7", pod=None), make_endpoint("10.0.0.8", pod=None)])
    assert len(conditions(part)) == 2
