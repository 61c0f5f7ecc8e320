"""One engine from the outside: what a worker sees."""

import pytest

from disagg.engine import ChunkDone, Refused, SequenceOutput
from disagg.engine.plan import PENDING, int32s
from support.clock import FakeClock
from support.engines import VOCAB, make_engine, make_request, run_all
from support.fake_runner import FakeRunner, expected_token


class SlowRunner(FakeRunner):
    """Each token takes a second."""

    def __init__(self, clock: FakeClock) -> None:
        super().__init__(16, 4, VOCAB)
        self.clock = clock

    def run(self, plan: object) -> list[int]:
        self.clock.advance(plan.num_tokens)
        return super().run(plan)


def test_an_idle_engine_does_nothing() -> None:
    engine = make_engine()
    assert engine.step() is None
    assert not engine.has_work
    assert engine.stats().running == 0


def test_stats_add_up_while_requests_come_and_go() -> None:
    engine = make_engine(max_num_seqs=2, max_num_batched_tokens=8)
    engine.add(make_request("push", range(9), prefill_only=True, max_tokens=4))
    engine.add(make_request("a", (1, 2, 3), max_tokens=4, ignore_eos=True))
    engine.add(make_request("b", (1, 2, 3), max_tokens=4, ignore_eos=True))
    engine.reserve(make_request("r", (4, 5), max_tokens=4), False)
    stats = engine.stats()
    assert (stats.running, stats.waiting, stats.reserved, stats.held) == (0, 3, 1, 0)
    assert (stats.queued_tokens, stats.pages_in_use) == (15, 2)
    engine.step()
    engine.step()
    stats = engine.stats()
    assert (stats.running, stats.waiting, stats.held, stats.queued_tokens) == (1, 1, 1, 3)
    run_all(engine)
    stats = engine.stats()
    assert (stats.running, stats.waiting, stats.reserved, stats.held) == (0, 0, 1, 1)
    assert stats.num_output_tokens == 9
    assert stats.num_prompt_tokens == 15
    assert not engine.has_work, "what remains waits for others"
    engine.release("push")
    assert engine.quarantine("r")
    stats = engine.stats()
    assert (stats.pages_quarantined, stats.pages_in_use) == (1, 1)
    assert stats.pages_free + stats.pages_cached + stats.pages_in_use == stats.pages_total
    engine.audit()


def test_times_are_told_with_the_first_output() -> None:
    clock = FakeClock()
    engine = make_engine(clock=clock, runner=SlowRunner(clock), max_num_batched_tokens=8)
    engine.add(make_request("a", range(8), max_tokens=2, ignore_eos=True))
    engine.add(make_request("b", range(10), max_tokens=1, cache_salt="b"))
    events = run_all(engine)[1]
    first = {e.request_id: e for e in events if e.cached_tokens is not None}
    assert (first["a"].queue_s, first["a"].compute_s) == (0, 8)
    # Seven tokens (down to a page's edge: four) beside a's second one, then the other six.
    assert (first["b"].queue_s, first["b"].compute_s) == (8, 11)


def test_rates_come_from_steps() -> None:
    clock = FakeClock()
    engine = make_engine(clock=clock, runner=SlowRunner(clock))
    engine.add(make_request("a", range(8), max_tokens=4, ignore_eos=True))
    run_all(engine)
    stats = engine.stats()
    assert (stats.prefill_tokens_per_s, stats.decode_step_s, stats.num_steps) == (1.0, 1.0, 4)


def test_a_step_reports_its_work() -> None:
    engine = make_engine()
    engine.add(make_request("a", (1, 2, 3), max_tokens=3, ignore_eos=True))
    engine.step()
    engine.add(make_request("b", (4, 5), max_tokens=3, ignore_eos=True))
    step = engine.step()
    assert step is not None
    assert (step.num_prefill_tokens, step.num_decode_tokens) == (2, 1)


def test_events_without_a_step_are_told_too() -> None:
    """A reservation that ends as it starts has nothing left to compute."""
    engine = make_engine()
    engine.reserve(make_request("a", (1, 2, 3), max_tokens=1), False)
    engine.start("a", 5, finished=False)
    step = engine.step()
    assert step is not None
    assert [e.finish_reason for e in step.events] == ["length"]
    assert engine.step() is None


def test_prefill_here_and_decode_there_is_the_same_text() -> None:
    """The whole hand-over, pages copied by hand."""
    prompt = [1, 2, 3, 4, 5, 6, 7]
    here, there = make_engine(max_num_batched_tokens=4), make_engine()
    request = make_request("a", prompt, max_tokens=8, ignore_eos=True, prefill_only=True)
    reservation = there.reserve(make_request("a", prompt, max_tokens=8, ignore_eos=True), False)
    here.add(request)
    sent = 0
    token = None
    while (step := here.step()) is not None:
        for event in step.events:
            if isinstance(event, SequenceOutput):
                token = event.token_ids[0]
            elif isinstance(event, ChunkDone):
                for i in range(sent, len(event.page_ids)):
                    there._runner.kv[reservation.page_ids[i]] = list(here._runner.kv[event.page_ids[i]])
                sent = len(event.page_ids)
    here.release("a")
    assert sent == 2
    assert token == expected_token(prompt, VOCAB)
    there.start("a", token, finished=False)
    text = [token, *run_all(there)[0]["a"]]
    unified = make_engine()
    unified.add(make_request("a", prompt, max_tokens=8, ignore_eos=True))
    assert text == run_all(unified)[0]["a"]
    for engine in (here, there, unified):
        assert engine.stats().pages_in_use == 0
        engine.audit()


def test_two_engines_in_one_process_share_nothing() -> None:
    a, b = make_engine(), make_engine()
    a.add(make_request("x"))
    assert b.step() is None
    assert not isinstance(b.add(make_request("x")), Refused)


def test_a_runner_that_fails_takes_the_step_down_not_the_books() -> None:
    """The worker ends with the runner's error, and its pages are counted to the last."""

    class Broken(FakeRunner):
        def run(self, plan: object) -> list[int]:
            raise RuntimeError("a rank is gone")

    engine = make_engine(runner=Broken(16, 4, VOCAB))
    engine.add(make_request("a"))
    with pytest.raises(RuntimeError, match="a rank is gone"):
        engine.step()
    engine.audit()


@pytest.mark.parametrize("depth", [1, 2])
def test_steps_in_flight_change_nothing_but_the_time_of_telling(depth: int) -> None:
    def generate(depth: int) -> tuple[list[object], FakeRunner]:
        runner = FakeRunner(16, 4, VOCAB, depth=depth)
        engine = make_engine(runner=runner, max_num_batched_tokens=8)
        for name, prompt, max_tokens in (("a", range(9), 6), ("b", (1, 2), 9), ("c", (3, 4, 5), 4)):
            engine.add(make_request(name, prompt, max_tokens=max_tokens))
        events = run_all(engine)[1]
        engine.audit()
        assert engine.stats().pages_in_use == 0
        told = sorted((e.request_id, e.position, tuple(e.token_ids), e.finish_reason) for e in events)
        return told, runner

    told, runner = generate(depth)
    assert told == generate(0)[0]
    pending = [plan for plan in runner.plans if (int32s(plan.token_ids) == PENDING).any()]
    assert pending, "steps were planned before the tokens that they need were known"


def test_a_step_in_flight_is_work_left() -> None:
    engine = make_engine(runner=FakeRunner(16, 4, VOCAB, depth=1))
    engine.add(make_request("a", (1, 2), max_tokens=1))
    launched = engine.step()
    assert launched is not None
    assert (launched.events, launched.step_s) == ([], 0.0)
    engine.abort("a")
    assert engine.has_work, "its pages are pinned until it has retired"
    retired = engine.step()
    assert retired is not None
    assert retired.events == []
    assert not engine.has_work
    engine.audit()
