"""One plan, every rank."""

from disagg.engine import Engine
from disagg.engine.plan import PENDING, StepPlan, StepRetired, int32s
from disagg.engine.ranks import LeadingRunner
from disagg.engine.scheduler import Scheduler
from disagg.protocol import decoder
from support.engines import VOCAB, make_cache, make_limits, make_request, run_all
from support.fake_runner import FakeRunner

PLAN = decoder(StepPlan)


def make_leader(send: object = None) -> LeadingRunner:
    return LeadingRunner(FakeRunner(16, 4, VOCAB), num_slots=4, send=send)


def test_followers_run_exactly_what_the_leader_runs() -> None:
    sent: list[bytes] = []
    leader = make_leader(sent.append)
    engine = Engine(runner=leader, cache=make_cache(), limits=make_limits(), eos_token_ids=[])
    for name, prompt in (("a", [1, 2, 3, 4, 5]), ("b", [6, 7])):
        engine.add(make_request(name, prompt, max_tokens=5))
    run_all(engine)
    follower = FakeRunner(16, 4, VOCAB)
    for plan in sent:
        follower.run(PLAN.decode(plan))
    assert follower.plans == leader._local.plans
    assert len(follower.plans) == len(sent) == 5
    assert follower.kv == leader._local.kv


def test_a_plan_survives_the_wire() -> None:
    sent: list[bytes] = []
    leader = make_leader(sent.append)
    engine = Engine(runner=leader, cache=make_cache(), limits=make_limits(), eos_token_ids=[])
    engine.add(make_request(seed=2**64 - 1, temperature=0.7, max_tokens=1))
    engine.step()
    assert PLAN.decode(sent[0]) == leader._local.plans[0]
    assert sent[0].startswith(b"\x9b\xa4step"), "a tagged array, so that a link can carry other messages"


def test_tokens_unknown_at_planning_are_filled_in_before_any_rank_sees_them() -> None:
    """Two steps planned ahead of the first one's end give what steps one by one give."""

    def generate(depth: int) -> list[int]:
        leader = make_leader()
        scheduler = Scheduler(
            cache=make_cache(), limits=make_limits(), eos_token_ids=frozenset(), clock=lambda: 0.0
        )
        scheduler.add(make_request(max_tokens=7))
        scheduler.add(make_request("b", [4, 5], max_tokens=3))
        flights, tokens = [], []
        while (plan := scheduler.plan()) or flights:
            flights += [plan] if plan else []
            if len(flights) == depth or plan is None:
                oldest = flights.pop(0)
                tokens += scheduler.retire(oldest, leader.launch(oldest)())
        seen = [int32s(plan.token_ids) for plan in leader._local.plans]
        assert not any((ids == PENDING).any() for ids in seen)
        return [(e.request_id, e.position, e.token_ids) for e in tokens]

    assert sorted(generate(1)) == sorted(generate(3))
    assert len(generate(1)) == 10


def test_ranks_that_run_beside_the_host_get_plans_as_they_are_and_hear_of_their_ends() -> None:
    """Each device has the tokens that the host does not know yet; pages of a retired step may be pushed."""
    sent: list[bytes] = []
    leader = LeadingRunner(FakeRunner(16, 4, VOCAB, depth=1), num_slots=4, send=sent.append)
    engine = Engine(runner=leader, cache=make_cache(), limits=make_limits(), eos_token_ids=[])
    engine.add(make_request(max_tokens=4))
    run_all(engine)
    follower = FakeRunner(16, 4, VOCAB, depth=1)
    order = []
    for message in map(decoder(StepPlan | StepRetired).decode, sent):
        if isinstance(message, StepPlan):
            follower.run(message)
        order.append((type(message).__name__, message.step))
    assert follower.plans == leader._local.plans
    assert any((int32s(plan.token_ids) == PENDING).any() for plan in follower.plans)
    assert follower.kv == leader._local.kv
    first = follower.plans[0].step
    steps = range(first, first + len(follower.plans))
    assert [step for name, step in order if name == "StepPlan"] == list(steps)
    assert [step for name, step in order if name == "StepRetired"] == list(steps)
    # Never two ahead, and the next is planned before the last has ended.
    assert order[:3] == [("StepPlan", first), ("StepPlan", first + 1), ("StepRetired", first)]
