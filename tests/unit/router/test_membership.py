"""Workers that discovery finds, retires and loses."""

import logging
from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from disagg.config import RoutingConfig
from disagg.errors import ConfigError, WorkerError
from disagg.kubernetes import Condition, Member
from disagg.protocol import Abort, Fenced, Generate, Goodbye, Prefill, Reserve, SummaryDelta
from disagg.router import Membership
from disagg.router.membership import plan_membership
from disagg.router.registry import Standing
from support.router import Actor, Harness

MakeRouter = Callable[..., Harness]

# --- the plan ------------------------------------------------------------------------------------

CASES: list[tuple[Standing | None, Condition | None, bool, Standing | None]] = [
    # standing before, condition now, connected to, standing becomes
    (None, "ready", True, None),
    (None, "not_ready", False, None),
    (None, "terminating", False, None),
    ("in", "ready", False, None),
    ("in", "not_ready", False, None),
    ("in", "terminating", False, "retired"),
    ("in", None, False, "gone"),
    ("retired", "ready", False, "in"),
    ("retired", "not_ready", False, None),
    ("retired", "terminating", False, None),
    ("retired", None, False, "gone"),
    ("gone", "ready", False, "in"),
    ("gone", "not_ready", False, "retired"),
    ("gone", "terminating", False, "retired"),
    ("gone", None, False, None),
]


@pytest.mark.parametrize(("before", "now", "connects", "becomes"), CASES)
def test_every_case_of_a_member(
    before: Standing | None, now: Condition | None, connects: bool, becomes: Standing | None
) -> None:
    plan = plan_membership({"a": before} if before else {}, {"a": now} if now else {})
    assert plan.connect == (["a"] if connects else [])
    assert plan.standings == ({"a": becomes} if becomes else {})


ADDRESSES = st.sampled_from("abcdef")


@given(
    known=st.dictionaries(ADDRESSES, st.sampled_from(["in", "retired", "gone"])),
    members=st.dictionaries(ADDRESSES, st.sampled_from(["ready", "not_ready", "terminating"])),
)
def test_a_plan_that_was_carried_out_leaves_nothing_to_do(
    known: dict[str, Standing], members: dict[str, Condition]
) -> None:
    """Whatever was before: the second look finds nothing, and who is ready is in, who is absent is gone."""
    plan = plan_membership(known, members)
    after = known | plan.standings | dict.fromkeys(plan.connect, "in")
    again = plan_membership(after, members)
    assert (again.connect, again.standings) == ([], {})
    assert {a for a, standing in after.items() if standing == "gone"} == after.keys() - members.keys()
    assert {a for a, c in members.items() if c == "ready"} <= {a for a, s in after.items() if s == "in"}
    assert not {a for a, c in members.items() if c == "terminating"} & {
        a for a, s in after.items() if s == "in"
    }


# --- the router ----------------------------------------------------------------------------------


class Release:
    """A router that is told of members by the test."""

    def __init__(self, router: Harness) -> None:
        self.router = router
        self.membership = Membership(router.dispatcher)

    def tell(self, **conditions: Condition) -> None:
        """Members by name; `decode_0` is at the address `decode-0`."""
        names = {name.replace("_", "-"): condition for name, condition in conditions.items()}
        self.membership.on_members({name: Member(name, c, pod=name) for name, c in names.items()})

    def join(self, name: str) -> Actor:
        """Play the worker behind a member that the router has connected to."""
        role = name.partition("-")[0]
        actor = Actor(self.router, role, name, self.router.connector.links[name])  # type: ignore[arg-type]
        self.router.actors[name] = actor
        actor.join()
        return actor

    def addresses(self) -> list[str]:
        return [worker.address for worker in self.router.dispatcher.registry]


@pytest.fixture
def release(router: Harness) -> Release:
    return Release(router)


def test_a_ready_member_is_connected_to_and_serves(release: Release, router: Harness) -> None:
    release.tell(decode_0="ready", decode_1="not_ready")
    assert release.addresses() == ["decode-0"]
    release.join("decode-0")
    assert router.service.healthy()


def test_a_terminating_worker_keeps_what_it_has_and_gets_nothing_new(
    release: Release, router: Harness
) -> None:
    release.tell(decode_0="ready", decode_1="ready")
    first, second = release.join("decode-0"), release.join("decode-1")
    client = router.submit(max_tokens=2)
    busy, idle = (first, second) if first.link.sent else (second, first)
    message = busy.take(Generate)
    release.tell(
        **{busy.welcome.worker_id.replace("-", "_"): "terminating"},
        **{idle.welcome.worker_id.replace("-", "_"): "ready"},
    )
    shown = {worker["id"]: worker["state"] for worker in router.service.workers()}
    assert shown == {busy.welcome.worker_id: "draining", idle.welcome.worker_id: "ready"}
    for _ in range(3):
        router.submit()
    assert not busy.sent()
    assert len(idle.sent()) == 3
    busy.tokens(message, 0, 10, 11, finish="length")
    assert client.tokens == [10, 11]


def test_a_request_waits_for_the_only_worker_s_successor(release: Release, router: Harness) -> None:
    """Both changes come at once where the watch paused meanwhile; the new link takes a moment to stand."""
    release.tell(decode_0="ready")
    release.join("decode-0")
    release.tell(decode_0="terminating", decode_1="ready")
    client = router.submit(max_tokens=1)
    new = release.join("decode-1")
    new.tokens(new.take(Generate), 0, 10, finish="length")
    assert client.tokens == [10]


@pytest.mark.parametrize("role", ["decode", "unified"])
def test_a_request_waits_while_no_worker_is_left_at_all(release: Release, router: Harness, role: str) -> None:
    """With `maxUnavailable: 1` the old pod is gone from the slices before the new one is in them."""
    release.tell(**{f"{role}_0": "ready"})  # type: ignore[arg-type]
    release.join(f"{role}-0").die()
    release.tell()
    router.advance(20.0)
    assert release.addresses() == []
    client = router.submit(max_tokens=1)
    release.tell(**{f"{role}_1": "ready"})  # type: ignore[arg-type]
    new = release.join(f"{role}-1")
    new.tokens(new.take(Generate), 0, 10, finish="length")
    assert client.tokens == [10]


def test_without_any_other_worker_the_terminating_one_does_not_serve(
    release: Release, router: Harness
) -> None:
    release.tell(decode_0="ready")
    release.join("decode-0")
    release.tell(decode_0="terminating")
    assert not router.service.healthy()
    router.advance(30.1)
    with pytest.raises(WorkerError):
        router.submit()


def test_a_member_that_is_gone_is_let_go_of_once_nothing_is_held_there(
    release: Release, router: Harness
) -> None:
    """Its slice entry may vanish while it still drains: what it has it finishes."""
    release.tell(decode_0="ready")
    decode = release.join("decode-0")
    client = router.submit(max_tokens=2)
    message = decode.take(Generate)
    release.tell()
    router.advance(1.0)
    assert not decode.link.closed
    decode.tokens(message, 0, 10, 11, finish="length")
    assert client.tokens == [10, 11]
    router.advance(0.1)
    assert decode.link.closed
    assert isinstance(decode.sent()[-1], Goodbye)
    assert release.addresses() == []
    assert router.sample("disagg_workers_lost_total", role="decode") == 0


def test_a_member_that_is_gone_and_dead_is_let_go_of_at_once(release: Release, router: Harness) -> None:
    release.tell(decode_0="ready", decode_1="ready")
    first, second = release.join("decode-0"), release.join("decode-1")
    client = router.submit(max_tokens=2)
    dying, other = (first, second) if first.link.sent else (second, first)
    release.tell(**{other.welcome.worker_id.replace("-", "_"): "ready"})
    dying.die()
    router.advance(0.1)
    assert dying.link.closed
    assert release.addresses() == [other.welcome.worker_id]
    other.tokens(other.take(Generate), 0, 10, 11, finish="length")
    assert client.tokens == [10, 11]


def test_a_dead_member_is_not_kept_for_a_fence_that_it_cannot_tell(release: Release, router: Harness) -> None:
    release.tell(prefill_0="ready", decode_0="ready")
    router.unproven.add("prefill-0")
    prefill, decode = release.join("prefill-0"), release.join("decode-0")
    client = router.submit()
    decode.reserve()
    prefill.take(Prefill)
    client.leave()
    prefill.die()
    release.tell(decode_0="ready")
    router.advance(0.1)
    assert release.addresses() == ["decode-0"]


def test_a_dead_member_that_is_still_listed_is_tried_again(release: Release, router: Harness) -> None:
    """A container that restarts keeps its pod and its address."""
    release.tell(decode_0="ready")
    decode = release.join("decode-0")
    decode.die()
    release.tell(decode_0="not_ready")
    router.advance(60.0)
    assert not decode.link.closed
    decode.restart()
    assert router.service.healthy()


def test_one_that_owes_a_fence_is_kept_until_it_has_told(release: Release, router: Harness) -> None:
    """Decode keeps pages until prefill says that it writes no more; hanging up would keep them for ever."""
    release.tell(prefill_0="ready", decode_0="ready")
    prefill, decode = release.join("prefill-0"), release.join("decode-0")
    client = router.submit()
    decode.reserve()
    prefill.take(Prefill)
    client.leave()
    release.tell(decode_0="ready")
    router.advance(0.1)
    abort = prefill.take(Abort)
    assert not prefill.link.closed
    prefill.say(Fenced(abort.transfer_id, abort.generation))
    router.advance(0.1)
    assert prefill.link.closed
    assert Fenced in {type(message) for message in decode.sent()}


def test_one_that_is_back_before_it_was_let_go_of_serves_again(release: Release, router: Harness) -> None:
    release.tell(decode_0="ready")
    decode = release.join("decode-0")
    router.submit(max_tokens=2)
    decode.take(Generate)
    release.tell()
    release.tell(decode_0="ready")
    router.advance(1.0)
    router.submit()
    decode.take(Generate)


def test_one_that_is_back_after_it_was_let_go_of_is_connected_to_again(
    release: Release, router: Harness
) -> None:
    release.tell(decode_0="ready")
    old = release.join("decode-0")
    release.tell()
    router.advance(0.1)
    release.tell(decode_0="ready")
    assert router.connector.links["decode-0"] is not old.link
    release.join("decode-0")
    assert router.service.healthy()


def test_the_number_of_a_removed_worker_is_used_again_without_its_pages(
    release: Release, router: Harness
) -> None:
    """The index has room for some thousand numbers, and a pool that rolls daily would use them up."""
    release.tell(decode_0="ready", decode_1="ready")
    first, second = release.join("decode-0"), release.join("decode-1")
    for actor in (first, second):
        actor.say(SummaryDelta(1, 1, (7).to_bytes(8, "little"), b""))
    index = router.dispatcher.registry.index
    release.tell(decode_1="ready")
    router.advance(0.1)
    assert index.match(np.array([7], np.uint64)).tolist() == [0, 1]
    release.tell(decode_1="ready", decode_2="ready", decode_3="ready")
    numbers = {worker.address: worker.number for worker in router.dispatcher.registry}
    assert numbers == {"decode-1": 1, "decode-2": 0, "decode-3": 2}
    release.join("decode-2").say(SummaryDelta(1, 1, (8).to_bytes(8, "little"), b""))
    assert index.match(np.array([7], np.uint64)).tolist() == [0, 1]
    assert index.match(np.array([8], np.uint64)).tolist() == [1, 0]


def test_addresses_that_were_given_are_left_alone(make_router: MakeRouter) -> None:
    router = make_router(routing=RoutingConfig())
    release = Release(router)
    given = router.add("decode")
    release.tell(decode_0="ready", decode_1="ready")
    release.join("decode-1")
    release.tell()
    router.advance(0.1)
    assert release.addresses() == ["decode-0"]
    router.submit()
    assert isinstance(given.sent()[0], Generate | Reserve)


def test_an_address_that_cannot_be_connected_to_is_said_and_tried_at_the_next_change(
    release: Release, router: Harness, caplog: pytest.LogCaptureFixture
) -> None:
    open_link = router.connector.open

    def refuse(address: str, events: object) -> None:
        raise ConfigError("workers must be loopback addresses")

    router.connector.open = refuse  # type: ignore[method-assign,assignment]
    with caplog.at_level(logging.ERROR):
        release.tell(decode_0="ready")
    assert "loopback" in caplog.text
    assert release.addresses() == []
    router.connector.open = open_link  # type: ignore[method-assign]
    release.tell(decode_0="ready")
    assert release.addresses() == ["decode-0"]
