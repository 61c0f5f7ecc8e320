"""Each rule of "Rules that keep KV right" in the architecture document, and what follows from them."""

from collections.abc import Sequence

import pytest

from disagg.errors import InvariantBroken
from disagg.protocol import PushDone
from disagg.transfer import expected_bytes
from disagg.worker.leases import (
    ASK_AGAIN_MAX_S,
    ASK_AGAIN_S,
    MAX_BARRED,
    MAX_REMEMBERED,
    AskFence,
    DrainRanks,
    Effect,
    Freed,
    Key,
    Kind,
    KvComplete,
    LeaseTable,
    Pushed,
    Quarantined,
    SayFenced,
    StopPush,
)
from support.clock import FakeClock
from support.transfer import make_layout

KEY = ("t", 1)
RETRY = ("t", 2)
TTL_S = 30.0
PAGES = (4, 5, 9)
HERE = make_layout(tp_size=2)
THERE = make_layout(tp_size=3)
PAIRS = [(0, 0), (1, 0), (1, 1), (2, 1)]
"""Which of three source ranks share heads with which of two target ranks."""


@pytest.fixture
def clock() -> FakeClock:
    return FakeClock()


@pytest.fixture
def leases(clock: FakeClock) -> LeaseTable:
    return LeaseTable(HERE, clock)


def grant(
    leases: LeaseTable,
    key: Key = KEY,
    kind: Kind = "incoming",
    pages: Sequence[int] = PAGES,
    owner: str = "r",
) -> list[Effect]:
    """Admit and grant at once, as a worker does where nothing comes in between."""
    admitted = leases.admit(key)
    assert admitted is not None
    target_uuid = "d" if kind == "outgoing" else None
    assert not leases.grant(key, kind=kind, owner=owner, ttl_s=TTL_S, page_ids=pages, target_uuid=target_uuid)
    return admitted


def done(pair: tuple[int, int], key: Key = KEY, num_pages: int = len(PAGES), token_id: int = 7) -> PushDone:
    num_bytes = expected_bytes(THERE, HERE, num_pages).get(pair, 0)
    return PushDone(
        key[0], key[1], pair[0], pair[1], num_bytes, token_id, position=0, finished=False, transport="nixl"
    )


def arrive(leases: LeaseTable, *pairs: tuple[int, int], key: Key = KEY, uuid: str = "p") -> list[Effect]:
    return [effect for pair in pairs for effect in leases.on_arrived(uuid, done(pair, key))]


def freed(effects: Sequence[Effect]) -> list[Key]:
    return [effect.key for effect in effects if isinstance(effect, Freed)]


def asked(effects: Sequence[Effect]) -> list[tuple[Key, str]]:
    return sorted((effect.key, effect.peer_uuid) for effect in effects if isinstance(effect, AskFence))


# A stale generation is dropped


def test_older_generation_is_dropped(leases: LeaseTable) -> None:
    grant(leases, RETRY)
    assert leases.admit(KEY) is None
    assert leases.abort(KEY) == leases.release(KEY) == []
    assert leases.is_live(RETRY)


def test_same_generation_is_admitted_once(leases: LeaseTable) -> None:
    """A message that arrives twice must not take pages twice."""
    grant(leases)
    assert leases.admit(KEY) is None
    leases.release(KEY)
    assert leases.admit(KEY) is None
    assert leases.num_stale == 2


@pytest.mark.parametrize("end", [LeaseTable.abort, LeaseTable.release])
def test_attempt_that_ended_before_it_came_is_not_admitted(leases: LeaseTable, end: object) -> None:
    """Else its pages would wait for a router that has given it up."""
    assert callable(end)
    assert end(leases, RETRY) == []
    assert leases.admit(KEY) is None
    assert leases.admit(RETRY) is None
    assert leases.admit(("t", 3)) == []


def test_attempt_that_ended_while_it_was_reserved_is_not_granted(leases: LeaseTable) -> None:
    """The engine may take its time between the two; nobody has been told of the pages yet."""
    leases.admit(KEY)
    leases.abort(KEY)
    effects = leases.grant(KEY, kind="incoming", owner="r", ttl_s=TTL_S, page_ids=PAGES)
    assert effects == [Freed(KEY, "incoming", PAGES, "aborted")]
    assert leases.num_leases == leases.num_quarantined == 0


def test_newer_generation_ends_the_older_one(leases: LeaseTable) -> None:
    leases.on_peer("p", THERE)
    grant(leases)
    effects = grant(leases, RETRY, pages=[0, 1, 2])
    assert effects[0] == Quarantined(KEY, "incoming", PAGES, "superseded")
    assert not leases.is_live(KEY)
    assert leases.is_live(RETRY)


def test_ending_an_attempt_ends_older_ones_of_its_transfer(leases: LeaseTable) -> None:
    """The router may give up a retry that this worker never saw."""
    grant(leases, kind="local")
    assert freed(leases.release(RETRY)) == [KEY]


def test_notification_of_an_older_generation_does_not_count(leases: LeaseTable) -> None:
    leases.on_peer("p", THERE)
    grant(leases)
    grant(leases, RETRY, pages=[0, 1, 2])
    arrive(leases, *PAIRS[:3], key=RETRY)
    assert not any(isinstance(effect, KvComplete) for effect in arrive(leases, *PAIRS, key=KEY))


def test_what_is_remembered_of_ended_transfers_is_bounded(leases: LeaseTable) -> None:
    for i in range(MAX_REMEMBERED + 10):
        leases.release((str(i), 1))
    assert leases.admit(("0", 1)) == []
    assert leases.admit((str(MAX_REMEMBERED), 1)) is None


def test_forgetting_a_transfer_does_not_forget_its_lease(leases: LeaseTable) -> None:
    leases.on_peer("p", THERE)
    grant(leases)
    leases.abort(KEY)
    for i in range(MAX_REMEMBERED + 10):
        leases.release((str(i), 1))
    assert leases.admit(KEY) is None


# Decode starts when every pair of ranks has notified


def test_kv_is_complete_when_every_pair_has_notified(leases: LeaseTable, clock: FakeClock) -> None:
    """In any order: transfers have none among themselves."""
    leases.on_peer("p", THERE)
    grant(leases)
    assert arrive(leases, PAIRS[3], PAIRS[0], PAIRS[2]) == []
    clock.advance(0.5)
    (complete,) = arrive(leases, PAIRS[1])
    num_bytes = sum(expected_bytes(THERE, HERE, len(PAGES)).values())
    assert complete == KvComplete(
        KEY,
        "p",
        7,
        0,
        False,
        num_pages=3,
        bytes_expected=num_bytes,
        bytes_received=num_bytes,
        wait_s=0.5,
        transport="nixl",
    )


def test_duplicate_notification_changes_nothing(leases: LeaseTable) -> None:
    leases.on_peer("p", THERE)
    grant(leases)
    assert arrive(leases, *PAIRS[:3], *PAIRS[:3]) == []
    assert len(arrive(leases, PAIRS[3])) == 1
    assert arrive(leases, *PAIRS) == []
    assert leases.num_stale == 3 + 4


def test_notification_of_an_unknown_process_or_attempt_does_not_count(leases: LeaseTable) -> None:
    grant(leases)
    assert arrive(leases, PAIRS[0]) == []
    leases.on_peer("p", THERE)
    assert arrive(leases, PAIRS[0], key=("other", 1)) == []
    assert leases.num_stale == 2


def test_notification_counts_although_its_sender_has_ended_since(leases: LeaseTable) -> None:
    """A prefill worker that pushed, said so and left has done its work; no retry follows."""
    leases.on_peer("p", THERE)
    grant(leases)
    leases.on_peer_gone("p")
    assert isinstance(arrive(leases, *PAIRS)[-1], KvComplete)


def contradictions() -> list[tuple[str, PushDone, str]]:
    return [
        ("q", done(PAIRS[1]), "both p and q wrote"),
        ("p", done((0, 1)), "shares no head"),
        ("p", done(PAIRS[1], num_pages=2), "bytes came from rank 1 to rank 0, expected"),
        ("p", done(PAIRS[1], token_id=8), "sampled different tokens"),
    ]


@pytest.mark.parametrize(("uuid", "wrong", "message"), contradictions())
def test_decode_never_starts_on_kv_that_contradicts_itself(
    leases: LeaseTable, uuid: str, wrong: PushDone, message: str
) -> None:
    """A short or mixed push would be served as a wrong answer, silently."""
    leases.on_peer("p", THERE)
    leases.on_peer("q", THERE)
    grant(leases)
    arrive(leases, PAIRS[0])
    effects = leases.on_arrived(uuid, wrong)
    assert isinstance(effects[0], Quarantined)
    assert effects[0].reason == "broken"
    assert message in effects[0].detail
    assert arrive(leases, *PAIRS) == [], "nor does what follows prove anything"
    assert leases.num_quarantined == 1


# A page is reused only when its old writer is fenced


def test_aborted_lease_keeps_its_pages_until_fenced(leases: LeaseTable, clock: FakeClock) -> None:
    """Pages that a transfer may still be writing are given to nobody, not even after expiry."""
    leases.on_peer("p", THERE)
    grant(leases)
    assert leases.abort(KEY) == [Quarantined(KEY, "incoming", PAGES, "aborted"), AskFence(KEY, "p")]
    clock.advance(10 * TTL_S)
    assert freed(leases.expire()) == []
    assert leases.quarantined_pages == set(PAGES)
    leases.on_peer_fenced(KEY, "p")
    assert freed(leases.on_drained(KEY)) == [KEY]
    assert leases.quarantined_pages == frozenset()


@pytest.mark.parametrize("end", ["abort", "release", "expire", "end_owner", "supersede"])
def test_every_way_to_end_quarantines_what_is_not_fenced(
    leases: LeaseTable, clock: FakeClock, end: str
) -> None:
    leases.on_peer("p", THERE)
    grant(leases)
    match end:
        case "abort":
            effects: list[Effect] | None = leases.abort(KEY)
        case "release":
            effects = leases.release(KEY)
        case "expire":
            clock.advance(TTL_S)
            effects = leases.expire()
        case "end_owner":
            effects = leases.end_owner("r")
        case _:
            effects = leases.admit(RETRY)
    assert effects is not None
    assert isinstance(effects[0], Quarantined)
    assert freed(effects) == []
    assert leases.num_leases == 0


def test_completed_transfer_fences(leases: LeaseTable) -> None:
    """Its writer notifies once every write has landed, and writes no more."""
    leases.on_peer("p", THERE)
    grant(leases)
    arrive(leases, *PAIRS)
    assert leases.release(KEY) == [Freed(KEY, "incoming", PAGES, "released")]


def test_transfer_that_completes_after_its_end_fences(leases: LeaseTable) -> None:
    leases.on_peer("p", THERE)
    grant(leases)
    arrive(leases, *PAIRS[:2])
    leases.abort(KEY)
    assert arrive(leases, *PAIRS[2:]) == [Freed(KEY, "incoming", PAGES, "aborted")]


def test_acknowledged_abort_fences(leases: LeaseTable) -> None:
    """The router passes the prefill worker's word on; what had reached this host lands first."""
    leases.on_peer("p", THERE)
    grant(leases)
    leases.abort(KEY)
    assert leases.on_fenced(KEY) == [DrainRanks(KEY)]
    assert leases.quarantined_pages == set(PAGES)
    assert freed(leases.on_drained(KEY)) == [KEY]


def test_fence_that_arrives_before_the_abort_counts(leases: LeaseTable) -> None:
    """As when prefill failed and its retry is about to come."""
    leases.on_peer("p", THERE)
    grant(leases)
    assert leases.on_fenced(KEY) == []
    effects = leases.admit(RETRY)
    assert effects == [Quarantined(KEY, "incoming", PAGES, "superseded"), DrainRanks(KEY)]


def test_kv_may_complete_after_its_fence(leases: LeaseTable) -> None:
    """They travel by different links; the end of a push that completed is a fence too."""
    leases.on_peer("p", THERE)
    grant(leases)
    leases.on_fenced(KEY)
    assert isinstance(arrive(leases, *PAIRS)[-1], KvComplete)


def test_process_that_is_gone_is_fenced(leases: LeaseTable) -> None:
    leases.on_peer("p", THERE)
    grant(leases)
    leases.abort(KEY)
    assert leases.on_peer_gone("p") == [DrainRanks(KEY)]


def test_process_that_is_gone_is_not_asked(leases: LeaseTable) -> None:
    leases.on_peer("p", THERE)
    leases.on_peer("q", THERE)
    leases.on_peer_gone("p")
    grant(leases)
    assert asked(leases.abort(KEY)) == [(KEY, "q")]


def test_late_hello_of_a_process_that_is_gone_is_not_waited_for(leases: LeaseTable) -> None:
    """Messages outlive their sender; its fence would never come."""
    leases.on_peer_gone("p")
    assert leases.on_peer("p", THERE) == []
    grant(leases)
    assert leases.abort(KEY)[1:] == [DrainRanks(KEY)]


def test_every_process_that_could_write_must_say_that_it_is_done(leases: LeaseTable) -> None:
    """A reservation does not tell who was asked to prefill, and the router may be dead."""
    leases.on_peer("p", THERE)
    leases.on_peer("q", THERE)
    grant(leases)
    assert asked(leases.abort(KEY)) == [(KEY, "p"), (KEY, "q")]
    assert leases.on_peer_fenced(KEY, "p") == leases.on_peer_fenced(KEY, "p") == []
    assert leases.on_peer_fenced(KEY, "stranger") == []
    assert leases.on_peer_fenced(KEY, "q") == [DrainRanks(KEY)]


def test_where_nobody_knows_the_pool_nobody_can_write(leases: LeaseTable) -> None:
    grant(leases)
    assert leases.abort(KEY)[1:] == [DrainRanks(KEY)]


def test_newcomer_is_told_what_has_ended_before_it_can_write(leases: LeaseTable) -> None:
    """Its Prefill may have waited in a queue while the router died and the lease expired."""
    grant(leases)
    leases.abort(KEY)
    leases.on_drained(KEY)
    assert leases.on_peer("p", THERE) == [AskFence(KEY, "p")]


def test_newcomer_is_told_although_the_others_have_answered(leases: LeaseTable) -> None:
    """Their word is about themselves."""
    leases.on_peer("p", THERE)
    grant(leases)
    leases.abort(KEY)
    leases.on_peer_fenced(KEY, "p")
    leases.on_drained(KEY)
    assert leases.on_peer("q", THERE) == [AskFence(KEY, "q")]


@pytest.mark.parametrize("how", ["fenced", "completed"])
def test_newcomer_is_not_told_what_its_writer_has_ended(leases: LeaseTable, how: str) -> None:
    leases.on_peer("p", THERE)
    grant(leases)
    leases.abort(KEY)
    if how == "fenced":
        leases.on_fenced(KEY)
    else:
        arrive(leases, *PAIRS)
    assert leases.on_peer("q", THERE) == []


def test_what_newcomers_are_told_is_bounded(leases: LeaseTable) -> None:
    for i in range(MAX_BARRED + 10):
        grant(leases, (str(i), 1))
        leases.abort((str(i), 1))
        leases.on_drained((str(i), 1))
    assert len(leases.on_peer("p", THERE)) == MAX_BARRED


def test_lost_fence_is_asked_for_again_ever_less_often(leases: LeaseTable, clock: FakeClock) -> None:
    leases.on_peer("p", THERE)
    grant(leases)
    leases.abort(KEY)
    for wait_s in (*(2**n * ASK_AGAIN_S for n in range(6)), ASK_AGAIN_MAX_S, ASK_AGAIN_MAX_S):
        clock.advance(wait_s - 0.5)
        assert leases.expire() == []
        clock.advance(0.5)
        assert leases.expire() == [AskFence(KEY, "p")]


def test_lease_that_awaits_no_page_needs_no_fence(leases: LeaseTable) -> None:
    leases.on_peer("p", THERE)
    grant(leases, pages=[])
    assert leases.abort(KEY) == [Freed(KEY, "incoming", (), "aborted")]


def test_page_in_quarantine_is_never_granted(leases: LeaseTable) -> None:
    leases.on_peer("p", THERE)
    grant(leases)
    leases.abort(KEY)
    with pytest.raises(InvariantBroken, match="page 9 was given to"):
        grant(leases, ("other", 1), pages=[9])


def test_landed_pages_are_the_engines_business(leases: LeaseTable) -> None:
    """It may trade one for a cached duplicate, and a later lease awaits writes on it."""
    leases.on_peer("p", THERE)
    grant(leases)
    arrive(leases, *PAIRS)
    grant(leases, ("other", 1))
    leases.audit()
    assert freed(leases.release(KEY)) == [KEY]
    leases.audit()


# Expiry is the backstop


def test_routers_death_frees_what_it_held_after_one_ttl(leases: LeaseTable, clock: FakeClock) -> None:
    grant(leases, ("a", 1), kind="local")
    grant(leases, ("b", 1), kind="local", owner="living")
    clock.advance(TTL_S - 1)
    leases.renew("living", TTL_S)
    assert leases.expire() == []
    clock.advance(1)
    assert leases.expire() == [Freed(("a", 1), "local", PAGES, "expired")]
    assert leases.is_live(("b", 1))


def test_goodbye_releases_every_lease_of_its_router(leases: LeaseTable) -> None:
    grant(leases, ("a", 1), kind="local")
    grant(leases, ("b", 1), kind="local", owner="other")
    assert freed(leases.end_owner("r")) == [("a", 1)]
    assert leases.end_owner("r") == []


def test_release_is_idempotent(leases: LeaseTable) -> None:
    grant(leases, kind="local")
    assert freed(leases.release(KEY)) == [KEY]
    assert leases.release(KEY) == leases.release(KEY) == []


def test_awaited_transfers_are_counted_until_no_write_can_land(leases: LeaseTable) -> None:
    """Also in quarantine: a writer's last writes end only while their receiver progresses them."""
    leases.on_peer("p", THERE)
    grant(leases, ("local", 1), kind="local", pages=[1])
    grant(leases)
    grant(leases, ("other", 1), pages=[1])
    assert leases.num_awaited == 2
    arrive(leases, *PAIRS)
    assert leases.num_awaited == 1
    leases.abort(("other", 1))
    leases.on_peer_fenced(("other", 1), "p")
    assert leases.num_awaited == 1
    leases.on_drained(("other", 1))
    assert leases.num_awaited == 0


# A prefill worker's pages are read until every rank's push has ended


def test_push_has_landed_when_every_rank_is_complete(leases: LeaseTable) -> None:
    grant(leases, kind="outgoing")
    assert leases.on_push_complete(KEY, 0, num_pages=3, num_bytes=100, seconds=0.5, transport="nixl") == []
    assert leases.on_push_complete(KEY, 1, num_pages=3, num_bytes=100, seconds=0.25, transport="nixl") == [
        Pushed(KEY, 3, 200, 0.5, "nixl")
    ]
    assert leases.release(KEY) == [Freed(KEY, "outgoing", PAGES, "released")]


def test_aborted_push_keeps_its_pages_until_every_rank_is_fenced(leases: LeaseTable) -> None:
    """Else a write under way would carry another request's KV to the decode worker."""
    grant(leases, kind="outgoing")
    assert leases.abort(KEY, asker="r") == [
        Quarantined(KEY, "outgoing", PAGES, "aborted"),
        StopPush(KEY),
    ]
    assert leases.on_rank_fenced(KEY, 1) == leases.on_rank_fenced(KEY, 1) == []
    assert leases.on_rank_fenced(KEY, 0) == [Freed(KEY, "outgoing", PAGES, "aborted"), SayFenced(KEY, "r")]


def test_push_that_completes_after_the_abort_is_fenced(leases: LeaseTable) -> None:
    grant(leases, kind="outgoing")
    leases.on_push_complete(KEY, 0, 3, 100, 0.5, "nixl")
    leases.abort(KEY)
    leases.on_push_complete(KEY, 1, 3, 100, 0.5, "nixl")
    assert freed(leases.on_rank_fenced(KEY, 0)) == [KEY]


def test_failed_push_ends_the_lease_and_says_when_it_is_fenced(leases: LeaseTable) -> None:
    """The router waits for it before it lets the decode worker's pages be reused, asked or not."""
    grant(leases, kind="outgoing")
    effects = leases.on_push_failed(KEY, 1, "the link broke")
    assert effects == [
        Quarantined(KEY, "outgoing", PAGES, "broken", "rank 1: the link broke"),
        StopPush(KEY),
    ]
    assert leases.on_push_failed(KEY, 0, "the link broke") == []
    leases.on_rank_fenced(KEY, 0)
    assert SayFenced(KEY, "r") in leases.on_rank_fenced(KEY, 1)


def test_abort_of_an_unknown_attempt_is_answered_at_once(leases: LeaseTable) -> None:
    """Nothing of it is under way, and its Prefill, should it come late, is not admitted."""
    assert leases.abort(KEY, asker="r") == [SayFenced(KEY, "r")]
    assert leases.admit(KEY) is None


def test_incoming_lease_is_not_this_workers_to_answer_for(leases: LeaseTable) -> None:
    leases.on_peer("p", THERE)
    grant(leases)
    leases.abort(KEY, asker="r")
    leases.on_peer_fenced(KEY, "p")
    assert freed(leases.on_drained(KEY)) == [KEY]
    assert leases.on_peer_fence(KEY, "d") == [SayFenced(KEY, "d")]


def test_decode_workers_question_ends_the_push_to_it(leases: LeaseTable) -> None:
    grant(leases, kind="outgoing")
    effects = leases.on_peer_fence(KEY, "d")
    assert StopPush(KEY) in effects
    leases.on_rank_fenced(KEY, 0)
    assert leases.on_rank_fenced(KEY, 1)[1:] == [SayFenced(KEY, "d"), SayFenced(KEY, "r")]


def test_decode_workers_question_leaves_a_push_to_another_alone(leases: LeaseTable) -> None:
    grant(leases, kind="outgoing")
    assert leases.on_peer_fence(KEY, "elsewhere") == [SayFenced(KEY, "elsewhere")]
    assert leases.is_live(KEY)


def test_question_of_a_decode_worker_bars_what_has_not_come_yet(leases: LeaseTable) -> None:
    """The Prefill may still be on its way when the decode worker's lease has ended."""
    assert leases.on_peer_fence(KEY, "d") == [SayFenced(KEY, "d")]
    assert leases.admit(KEY) is None
    assert leases.admit(RETRY) == []


def test_completed_push_is_fenced(leases: LeaseTable) -> None:
    grant(leases, kind="outgoing")
    leases.on_push_complete(KEY, 0, 3, 100, 0.5, "nixl")
    leases.on_push_complete(KEY, 1, 3, 100, 0.5, "nixl")
    effects = leases.abort(KEY, asker="r")
    assert effects == [Freed(KEY, "outgoing", PAGES, "aborted"), SayFenced(KEY, "r")]


def test_audit_finds_a_page_with_the_wrong_holder(leases: LeaseTable) -> None:
    grant(leases)
    leases.audit()
    leases._holder[PAGES[0]] = ("other", 1)
    with pytest.raises(InvariantBroken, match="pages that await writes"):
        leases.audit()
