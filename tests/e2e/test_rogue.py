"""A pod that is none of ours, with NetworkPolicy and without."""

import pytest

from e2e.cluster import Pod, Release, helm_test, installed, kubectl


def _reached(release: Release) -> dict:
    address = release.pods("decode")[0]["status"]["podIP"]
    pod = Pod("rogue", "rogue.py", address)
    try:
        return pod.wait(120)[-1]
    finally:
        pod.remove()


@pytest.fixture(autouse=True)
def _remove_the_key() -> None:
    yield
    kubectl("delete", "secret", "closed-keys", "open-keys", "--ignore-not-found")


def test_network_policy_closes_every_port_of_a_worker() -> None:
    """The release itself goes on working behind it."""
    with installed("closed") as release:
        assert _reached(release) == {"open": [], "answers": [None, None]}
        helm_test(release.name)


def test_without_an_allowed_key_the_control_port_says_nothing() -> None:
    """The port is open, and yet neither a client without CURVE nor one with a key of its own hears a word."""
    with installed("open", networkPolicy={"enabled": False}) as release:
        reached = _reached(release)
        assert {5600, 8080} <= set(reached["open"])
        assert reached["answers"] == [None, None]
        helm_test(release.name)
