"""A request that is refused or given up before it runs leaves no page behind, on either side.

https://github.com/vllm-project/vllm-ascend/pull/13929: decode refused a request before its scheduler
knew it, so nobody told prefill, whose pages stayed allocated until a timeout.
"""

import pytest

from disagg.engine import Refused, Reservation
from support.engines import make_engine, make_request, run_all

PROMPT = [1, 2, 3, 4, 5, 6, 7, 8, 9]


@pytest.mark.parametrize(
    "changes",
    [{"max_tokens": -1}, {"token_ids": [1] * 64}, {"token_ids": [99]}, {"request_id": "taken"}],
    ids=str,
)
def test_a_refused_reservation_takes_and_locks_nothing(changes: dict) -> None:
    engine = make_engine()
    engine.add(make_request("warm", PROMPT, max_tokens=1))
    run_all(engine)
    engine.reserve(make_request("taken", [5, 6], max_tokens=2), False)
    before = engine.stats()
    fields = {"request_id": "new", "token_ids": PROMPT, "max_tokens": 4, **changes}
    assert isinstance(engine.reserve(make_request(**fields), False), Refused)
    after = engine.stats()
    assert (after.pages_in_use, after.pages_free) == (before.pages_in_use, before.pages_free)
    engine.audit()


def test_a_reservation_refused_for_want_of_pages_unlocks_its_match() -> None:
    """It has looked its prefix up and locked it by then."""
    engine = make_engine(num_pages=4)
    engine.add(make_request("warm", PROMPT, max_tokens=1))
    run_all(engine)
    assert engine.stats().pages_cached == 2
    held = engine.reserve(make_request("held", [9, 8], max_tokens=2), False)
    assert isinstance(held, Reservation)
    refused = engine.reserve(make_request("big", [*PROMPT, 1, 1, 1, 1], max_tokens=4), False)
    assert isinstance(refused, Refused)
    assert refused.reason == "no_pages"
    engine.abort("held")
    stats = engine.stats()
    assert (stats.pages_in_use, stats.pages_cached) == (0, 2)
    engine.audit()


def test_a_finished_prefill_that_nobody_fetches_is_freed_by_its_release() -> None:
    engine = make_engine()
    engine.add(make_request("a", PROMPT, max_tokens=4, prefill_only=True))
    engine.add(make_request("waits", PROMPT, max_tokens=4, prefill_only=True, cache_salt="x"))
    engine.step()
    engine.release("waits")
    engine.release("a")
    stats = engine.stats()
    assert (stats.pages_in_use, stats.held, stats.waiting, stats.queued_tokens) == (0, 0, 0, 0)
    engine.audit()
