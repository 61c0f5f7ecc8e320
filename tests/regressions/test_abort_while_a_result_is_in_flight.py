"""An abort between a step's plan and its result frees each page and slot once, and only afterwards.

https://github.com/sgl-project/mini-sglang/pull/111: the abort freed the request's row, and the result
that arrived next freed it again, so two later requests were given the same one.
"""

import pytest

from disagg.engine import Refused
from disagg.engine.sequence import State
from support.engines import VOCAB, make_request, make_scheduler
from support.fake_runner import FakeRunner


@pytest.mark.parametrize("ends", [False, True], ids=["goes on", "ends in this very step"])
@pytest.mark.parametrize("in_flight", [1, 2, 3])
def test_pages_and_slot_return_once_when_the_last_step_has_retired(ends: bool, in_flight: int) -> None:
    scheduler = make_scheduler(max_num_seqs=2)
    runner = FakeRunner(16, 4, VOCAB)
    scheduler.add(make_request("a", [1, 2, 3], max_tokens=in_flight if ends else 9, ignore_eos=True))
    plans = [scheduler.plan() for _ in range(in_flight)]
    scheduler.abort("a")
    for i, plan in enumerate(plans):
        assert scheduler._slots.num_free == 1, f"step {i + 1} still uses the slot"
        assert scheduler._cache.num_in_use > 0
        assert scheduler.retire(plan, runner.run(plan)) == []
        scheduler.audit()
    assert scheduler._slots.num_free == 2
    assert scheduler._cache.num_in_use == 0
    # Both slots can be had, and are two.
    for name in "bc":
        scheduler.add(make_request(name, [4, 5], max_tokens=2))
    plan = scheduler.plan()
    assert plan.num_rows == 2
    assert len(set(plan.slots[i : i + 4] for i in (0, 4))) == 2


def test_pages_in_flight_are_given_to_nobody() -> None:
    scheduler = make_scheduler(num_pages=3, max_num_batched_tokens=16)
    runner = FakeRunner(3, 4, VOCAB)
    scheduler.add(make_request("a", [1] * 8, max_tokens=2, ignore_eos=True))
    plan = scheduler.plan()
    scheduler.abort("a")
    assert isinstance(scheduler.reserve(make_request("b", [2] * 4, max_tokens=2), False), Refused)
    scheduler.add(make_request("c", [3] * 4, max_tokens=2))
    assert scheduler.plan() is None
    scheduler.retire(plan, runner.run(plan))
    assert scheduler.plan() is not None
    assert scheduler.count(State.WAITING) == 0
