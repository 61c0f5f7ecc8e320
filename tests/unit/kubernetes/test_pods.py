"""Which pods are proven to have ended. A false proof lets two processes write one page."""

from typing import Any

import msgspec
import pytest

from disagg.kubernetes.pods import Pod, PodEnd, PodEnds, end_of
from support.api_server import make_pod


def read(*pods: dict[str, Any]) -> list[Pod]:
    return msgspec.convert(list(pods), list[Pod])


def pod(*args: Any, **options: Any) -> Pod:
    return read(make_pod(*args, **options))[0]


@pytest.mark.parametrize(
    ("phase", "is_end"),
    [
        ("Succeeded", True),
        ("Failed", True),
        ("Running", False),
        ("Pending", False),
        ("Unknown", False),
        ("", False),
    ],
)
def test_the_phase_tells_the_end(phase: str, is_end: bool) -> None:
    """`Unknown` is what old API servers say of a node that nobody reaches: the opposite of a proof."""
    expected = PodEnd("p", frozenset({"10.0.0.7"})) if is_end else None
    assert end_of(pod("p", phase, "10.0.0.7")) == expected


@pytest.mark.parametrize(
    "changes",
    [
        {"deletionTimestamp": "2026-01-01T00:00:00Z"},
        {"deletionTimestamp": "2026-01-01T00:00:00Z", "deletionGracePeriodSeconds": 0},
    ],
)
def test_a_pod_that_is_being_deleted_has_not_ended(changes: dict[str, Any]) -> None:
    raw = make_pod("p", "Running", "10.0.0.7")
    raw["metadata"] |= changes
    raw["status"]["conditions"] = [{"type": "DisruptionTarget", "status": "True"}]
    raw["status"]["containerStatuses"] = [{"state": {"terminated": {"exitCode": 137}}}]
    assert end_of(read(raw)[0]) is None


def test_a_pod_without_a_status_has_not_ended() -> None:
    raw = make_pod("p")
    del raw["status"]
    assert end_of(read(raw)[0]) is None


@pytest.mark.parametrize("owner", ["StatefulSet", "LeaderWorkerSet", "Job", None])
def test_pods_whose_names_come_again_give_no_proof(owner: str | None) -> None:
    """The old pod's end, told late, would be taken for that of the new one at the same address."""
    assert end_of(pod("p", "Failed", "10.0.0.7", owner=owner)) is None


def test_every_address_of_a_pod_is_told() -> None:
    end = end_of(pod("p", "Failed", "10.0.0.7", "fd00::7"))
    assert end == PodEnd("p", frozenset({"10.0.0.7", "fd00::7"}))


def test_an_end_without_an_address_is_nobodys() -> None:
    assert end_of(pod("p", "Failed")) is None


# --- over time -----------------------------------------------------------------------------------


class Told:
    """What one after another state of the pods of a release means."""

    def __init__(self) -> None:
        self.ends = PodEnds()

    def __call__(self, *pods: dict[str, Any], removed: dict[str, Any] | None = None) -> set[str]:
        gone = None if removed is None else read(removed)[0]
        return {f"{end.name}@{','.join(sorted(end.ips))}" for end in self.ends.take(read(*pods), gone)}


@pytest.fixture
def told() -> Told:
    return Told()


RUNNING, FAILED = make_pod("p", "Running", "10.0.0.7"), make_pod("p", "Failed", "10.0.0.7")


def test_an_end_is_told_once(told: Told) -> None:
    assert told(RUNNING) == set()
    assert told(FAILED) == {"p@10.0.0.7"}
    assert told(FAILED, make_pod("other", "Running", "10.0.0.8")) == set()
    assert told(removed=FAILED) == set()
    assert told() == set()


def test_a_pod_that_vanishes_has_not_ended(told: Told) -> None:
    """Somebody has force-deleted it: its node may be out of reach, and its process at work."""
    assert told(RUNNING) == set()
    assert told(removed=RUNNING) == set()
    assert told() == set()


def test_a_pod_that_is_missing_in_a_list_has_not_ended(told: Told) -> None:
    assert told(RUNNING) == set()
    assert told() == set()
    assert told(make_pod("q", "Running", "10.0.0.7")) == set()


def test_the_last_state_of_one_that_is_gone_may_be_its_end(told: Told) -> None:
    """Events are merged: its end may be told with its removal alone."""
    assert told(RUNNING) == set()
    assert told(removed=FAILED) == {"p@10.0.0.7"}


def test_an_end_that_only_a_list_shows_counts(told: Told) -> None:
    """Versions too old to follow on from: what happened meanwhile is found by listing."""
    assert told(RUNNING) == set()
    assert told(FAILED, make_pod("q", "Running", "10.0.0.8")) == {"p@10.0.0.7"}
    assert Told()(FAILED) == {"p@10.0.0.7"}, "in a router's first list too"


def test_an_end_without_addresses_has_those_from_before(told: Told) -> None:
    """Kubelets 1.27 to 1.30 drop them from the first report of the end."""
    bare = make_pod("p", "Failed")
    assert told(RUNNING) == set()
    assert told(bare) == {"p@10.0.0.7"}
    assert told(FAILED) == set()


@pytest.mark.parametrize("in_list", [True, False])
def test_addresses_from_before_are_the_same_pods(told: Told, in_list: bool) -> None:
    """One that is called the same is another pod."""
    assert told(RUNNING) == set()
    other = make_pod("p", "Failed", uid="another")
    assert (told(other) if in_list else told(removed=other)) == set()


def test_an_end_whose_addresses_come_later_is_told_then(told: Told) -> None:
    assert told(make_pod("p", "Failed")) == set()
    assert told(FAILED) == {"p@10.0.0.7"}
