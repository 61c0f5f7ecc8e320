"""Who gets a sequence, as tables: facts in, placement out."""

from typing import Any

import pytest

from disagg.config import DisaggregateMode, RoutingPolicyName
from disagg.router.policy import (
    HAND_OVER_S,
    Decided,
    Held,
    Impossible,
    Job,
    Placement,
    Wait,
    WorkerFacts,
    cached_tokens,
    decide,
    decode_s,
    local_s,
    prefill_s,
    remote_s,
    transfer_s,
    with_held,
)

FACTS: dict[str, Any] = {
    "running": 0,
    "max_num_seqs": 8,
    "free_pages": 1000,
    "total_pages": 1000,
    "backlog_tokens": 0.0,
    "chunk_tokens": 1000,
    "matched_tokens": 0,
    "prefill_tokens_per_s": 1000.0,
    "decode_step_s": 0.01,
    "transfer_bytes_per_s": 1e6,
    "page_size": 16,
    "page_bytes": 10_000,
}


def worker(name: str, **changes: Any) -> WorkerFacts:
    """`p…` prefills, `d…` decodes, `u…` does both."""
    role = {"p": "prefill", "d": "decode", "u": "unified"}[name[0]]
    return WorkerFacts(uuid=name, role=role, **(FACTS | changes))  # type: ignore[arg-type]


def job(num_tokens: int = 320, **changes: Any) -> Job:
    return Job(num_tokens, changes.pop("max_new_tokens", 10), **changes)


def place(
    *workers: WorkerFacts,
    mode: DisaggregateMode = "always",
    policy: RoutingPolicyName = "cost",
    turn: int = 0,
    **changes: Any,
) -> Decided:
    return decide(mode, policy, workers, job(**changes), turn=turn)


def pair_of(decided: Decided) -> tuple[str | None, str]:
    assert isinstance(decided, Placement), decided
    return decided.prefill_uuid, decided.decode_uuid


# --- predictions -------------------------------------------------------------------------------


def test_predictions_are_in_seconds() -> None:
    plain = job(320)
    assert prefill_s(worker("p", backlog_tokens=500.0, matched_tokens=160), plain) == pytest.approx(0.66)
    assert transfer_s(worker("d", matched_tokens=160), plain, 1e6, cap_match=False) == pytest.approx(0.1)
    assert decode_s(worker("d", running=4), plain) == pytest.approx(0.15)
    assert local_s(worker("d", running=3, backlog_tokens=100.0), plain) == pytest.approx(0.1 + 0.32 * 4)
    both = remote_s(worker("p"), worker("d"), plain, cap_match=False)
    assert both == pytest.approx(HAND_OVER_S + 0.32 + 0.2)


@pytest.mark.parametrize(
    ("num_tokens", "matched", "cap_match", "cached"),
    [
        (32, 0, True, 0),
        (32, 16, True, 16),
        (32, 32, True, 16),  # the last page has to move
        (33, 32, True, 32),  # which here nobody has cached
        (32, 32, False, 32),
        (5, 0, True, 0),
    ],
)
def test_cached_tokens(num_tokens: int, matched: int, cap_match: bool, cached: int) -> None:
    facts = worker("d", matched_tokens=matched)
    assert cached_tokens(facts, job(num_tokens), cap_match=cap_match) == cached


# --- modes -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("mode", "workers", "decision", "reason", "silent"),
    [
        ("always", ["p", "d"], "disaggregated", "always", False),
        ("never", ["p", "d"], "local", "never", False),
        ("always", ["d"], "local", "no prefill worker", True),
        ("auto", ["d"], "local", "no prefill worker", True),
        ("always", ["p", "u"], "local", "no decode worker", True),
        ("always", ["u"], "local", "unified", False),
        ("auto", ["u"], "local", "unified", False),
        ("never", ["d"], "local", "never", False),
        ("always", ["p", "d", "u"], "disaggregated", "always", False),
    ],
)
def test_modes(mode: DisaggregateMode, workers: list[str], decision: str, reason: str, silent: bool) -> None:
    placed = place(*map(worker, workers), mode=mode)
    assert isinstance(placed, Placement)
    assert (placed.decision, placed.reason, placed.is_silent) == (decision, reason, silent)


def test_an_override_shows_in_the_reason() -> None:
    placed = decide("always", "cost", [worker("p"), worker("d")], job(), is_override=True)
    assert isinstance(placed, Placement)
    assert placed.reason == "header: always"


@pytest.mark.parametrize(
    ("changes", "decision"),
    [
        # A short suffix is cheaper where the rest is cached already.
        ({"d": {"matched_tokens": 304}}, "local"),
        # A long one beside running decodes makes all of them wait.
        ({"d": {"running": 7}}, "disaggregated"),
        # Nobody waits, and the transfer costs more than it saves.
        ({"d": {}}, "local"),
        # A slow prefiller on the decode side.
        ({"d": {"prefill_tokens_per_s": 100.0}}, "disaggregated"),
        # A slow wire.
        ({"d": {"running": 1}, "p": {"transfer_bytes_per_s": 1e4}}, "local"),
        # The prefill side has it cached.
        ({"d": {"running": 1}, "p": {"matched_tokens": 304}}, "disaggregated"),
    ],
)
def test_auto_compares_predicted_times(changes: dict[str, dict[str, Any]], decision: str) -> None:
    placed = place(worker("p", **changes.get("p", {})), worker("d", **changes["d"]), mode="auto")
    assert isinstance(placed, Placement)
    assert placed.decision == decision
    remote, local = placed.predicted.remote_s, placed.predicted.local_s
    assert remote is not None
    assert local is not None
    assert (local <= remote) == (decision == "local")


def test_auto_waits_for_a_busy_prefill_worker_where_that_is_still_faster() -> None:
    busy = worker("p", backlog_tokens=1500.0)
    assert isinstance(place(busy, worker("d", running=7), mode="auto"), Wait)
    placed = place(busy, worker("d", running=1), mode="auto")
    assert isinstance(placed, Placement)
    assert placed.decision == "local"


# --- picks -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("policy", "expected"),
    [
        # p1 is idle, p2 has most of the prompt and some work before it; d1 is emptier, d2 has some of it.
        ("cost", ("p2", "d2")),
        ("prefix", ("p2", "d2")),
        ("least_load", ("p1", "d1")),
    ],
)
def test_policies(policy: RoutingPolicyName, expected: tuple[str, str]) -> None:
    workers = [
        worker("p1"),
        worker("p2", matched_tokens=304, backlog_tokens=100.0),
        worker("d1", running=1),
        worker("d2", running=2, matched_tokens=160),
    ]
    assert pair_of(place(*workers, policy=policy)) == expected


def test_cost_turns_to_the_idle_worker_when_the_queue_outweighs_the_prefix() -> None:
    workers = [worker("p1"), worker("p2", matched_tokens=304, backlog_tokens=400.0), worker("d")]
    assert pair_of(place(*workers)) == ("p1", "d")
    assert pair_of(place(*workers, policy="prefix")) == ("p2", "d")


def test_round_robin_takes_turns() -> None:
    workers = [worker(name) for name in ("p1", "p2", "d1", "d2", "d3")]
    pairs = [pair_of(place(*workers, policy="round_robin", turn=turn)) for turn in range(6)]
    assert [p for p, _ in pairs] == ["p1", "p2"] * 3
    assert [d for _, d in pairs] == ["d1", "d2", "d3"] * 2


@pytest.mark.parametrize("policy", ["cost", "prefix", "least_load"])
def test_ties_go_to_the_lower_uuid_in_whatever_order(policy: RoutingPolicyName) -> None:
    workers = [worker(name) for name in ("d2", "p2", "d1", "p1")]
    assert pair_of(place(*workers, policy=policy)) == ("p1", "d1")
    assert pair_of(place(*reversed(workers), policy=policy)) == ("p1", "d1")


# --- room --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "changes",
    [
        {"running": 8},
        {"free_pages": 20},  # 320 tokens and one more need 21
    ],
)
def test_a_decode_worker_without_room_is_passed_over(changes: dict[str, int]) -> None:
    full = worker("d1", **changes)
    assert pair_of(place(worker("p"), full, worker("d2", running=7))) == ("p", "d2")
    assert isinstance(place(worker("p"), full), Wait)


def test_what_is_cached_needs_no_room() -> None:
    assert pair_of(place(worker("p"), worker("d", free_pages=11, matched_tokens=160))) == ("p", "d")
    assert isinstance(place(worker("p"), worker("d", free_pages=10, matched_tokens=160)), Wait)


@pytest.mark.parametrize("changes", [{"backlog_tokens": 1001.0}, {"free_pages": 20}])
def test_a_prefill_worker_that_cannot_begin_is_passed_over(changes: dict[str, Any]) -> None:
    assert pair_of(place(worker("p1", **changes), worker("p2"), worker("d"))) == ("p2", "d")
    assert isinstance(place(worker("p1", **changes), worker("d")), Wait)


def test_pairs_that_cannot_exchange_kv_are_avoided() -> None:
    workers = [worker("p1"), worker("p2"), worker("d1"), worker("d2")]
    excluded = frozenset({("p1", "d1"), ("p2", "d1")})
    assert pair_of(place(*workers, excluded_pairs=excluded)) == ("p1", "d2")
    placed = place(*workers[:3], excluded_pairs=excluded)
    assert isinstance(placed, Placement)
    assert (placed.decision, placed.is_silent) == ("local", True)


@pytest.mark.parametrize(
    ("workers", "changes", "kind"),
    [
        ([], {}, Wait),
        (["p"], {}, Wait),
        (["p", "d"], {"num_tokens": 16_000}, Impossible),
        (["p", "d"], {"num_tokens": 15_999}, Placement),
        (["p", "d"], {"excluded_workers": frozenset({"d"})}, Impossible),
        (["p", "d"], {"excluded_workers": frozenset({"p"})}, Placement),
    ],
)
def test_what_can_never_be_served_is_said_so(workers: list[str], changes: dict[str, Any], kind: type) -> None:
    facts = [worker(name, chunk_tokens=20_000) for name in workers]
    assert type(place(*facts, **changes)) is kind


def test_what_a_worker_still_holds_counts_as_cached_and_not_as_queued() -> None:
    held = Held("p2", num_tokens=300, backlog_tokens=200)
    facts = with_held(worker("p2", backlog_tokens=250.0), held)
    assert (facts.matched_tokens, facts.backlog_tokens) == (300, 50.0)
    other = worker("p1", backlog_tokens=250.0)
    assert with_held(other, held) is other
