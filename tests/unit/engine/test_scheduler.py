"""Which sequences run, in what order, and what becomes of them: one rule a test."""

import numpy as np
import pytest

from disagg.engine import Added, ChunkDone, Refused, Reservation, Scheduler, SequenceOutput, StepPlan
from disagg.engine.plan import int32s
from disagg.engine.sequence import State
from disagg.errors import InvariantBroken
from support.engines import EOS, VOCAB, make_request, make_scheduler
from support.fake_runner import FakeRunner, expected_token

PAGE_SIZE = 4


class Driver:
    """A scheduler and a runner, stepped by hand."""

    def __init__(self, num_pages: int = 16, prefix: str = "radix", **limits: object) -> None:
        self.scheduler: Scheduler = make_scheduler(num_pages, PAGE_SIZE, prefix, **limits)
        self.runner = FakeRunner(num_pages, PAGE_SIZE, VOCAB)
        self.cache = self.scheduler._cache

    def add(self, request_id: str, token_ids: object = (1, 2, 3), **changes: object) -> Added | Refused:
        return self.scheduler.add(
            make_request(request_id, token_ids, **{"max_tokens": 8, "ignore_eos": True, **changes})
        )

    def reserve(
        self, request_id: str, token_ids: object, cap_match: bool = False, **changes: object
    ) -> Reservation | Refused:
        request = make_request(request_id, token_ids, **{"max_tokens": 8, "ignore_eos": True, **changes})
        return self.scheduler.reserve(request, cap_match)

    def land(self, reservation: Reservation, token_ids: object) -> int:
        """Write a reservation's KV, and return the token that follows."""
        self.runner.write(reservation.page_ids, token_ids, reservation.first_missing_page)
        return expected_token(token_ids, VOCAB)

    def step(self) -> list[SequenceOutput | ChunkDone]:
        plan = self.scheduler.plan()
        if plan is None:
            return self.scheduler.take_events()
        events = self.scheduler.retire(plan, self.runner.run(plan))
        self.scheduler.audit()
        return events

    def run(self) -> list[SequenceOutput | ChunkDone]:
        events = []
        while new := self.step():
            events += new
        return events

    @property
    def in_use(self) -> int:
        return self.cache.num_in_use


def lens(plan: StepPlan) -> list[int]:
    return int32s(plan.query_lens).tolist()


def tokens_of(events: list, request_id: str) -> list[int]:
    outputs = [e for e in events if isinstance(e, SequenceOutput) and e.request_id == request_id]
    return [token for output in outputs for token in output.token_ids]


def greedy(token_ids: object, n: int) -> list[int]:
    """What the fake model says after `token_ids`."""
    tokens = list(token_ids)
    while len(tokens) < len(token_ids) + n:
        tokens.append(expected_token(tokens, VOCAB))
    return tokens[len(token_ids) :]


# --- steps ---------------------------------------------------------------------------------------


def test_a_prompt_is_computed_in_chunks_under_the_budget() -> None:
    driver = Driver(max_num_batched_tokens=10)
    prompt = [i % VOCAB for i in range(21)]
    driver.add("a", prompt)
    plans = []
    while len(plans) < 4:
        plans.append(driver.scheduler.plan())
        events = driver.scheduler.retire(plans[-1], driver.runner.run(plans[-1]))
    assert [lens(plan) for plan in plans] == [[8], [8], [5], [1]]
    assert [plan.num_samples for plan in plans] == [0, 0, 1, 1]
    assert tokens_of(events, "a") == greedy(prompt, 2)[1:]


def test_decodes_come_first_and_prefill_takes_the_rest_of_the_budget() -> None:
    driver = Driver(max_num_batched_tokens=10)
    driver.add("a")
    driver.add("b", (4, 5))
    driver.step()
    driver.add("c", range(10))
    plan = driver.scheduler.plan()
    assert (lens(plan), plan.num_decodes, plan.num_tokens) == ([1, 1, 8], 2, 10)


def test_no_more_sequences_run_than_there_are_slots() -> None:
    driver = Driver(max_num_seqs=2, num_pages=32)
    for name in "abc":
        driver.add(name, max_tokens=3)
    driver.step()
    assert driver.scheduler.count(State.WAITING) == 1
    assert [e.request_id for e in driver.step()] == ["a", "b"]
    driver.step()
    assert [e.request_id for e in driver.step()] == ["c"]


def test_requests_begin_in_the_order_of_their_arrival() -> None:
    driver = Driver(max_num_batched_tokens=8)
    for name in "abc":
        driver.add(name, range(6), max_tokens=1, cache_salt=name)
    order = [e.request_id for e in driver.run()]
    assert order == ["a", "b", "c"]


def test_a_waiting_request_that_lacks_pages_is_not_overtaken() -> None:
    """Small requests that slip past would starve it."""
    driver = Driver(num_pages=8)
    driver.add("a", [1] * 16, max_tokens=6)
    driver.step()
    driver.add("big", [2] * 12, max_tokens=2)
    driver.add("small", [3], max_tokens=2)
    driver.step()
    assert driver.scheduler.count(State.WAITING) == 2
    ends = [e.request_id for e in driver.run() if e.finish_reason]
    assert ends == ["a", "big", "small"]


def test_reservations_do_not_starve_a_request_that_lacks_pages() -> None:
    """They would take every page that comes free before it."""
    driver = Driver(num_pages=8)
    driver.add("a", [1] * 16, max_tokens=6)
    driver.step()
    driver.add("big", [2] * 12, max_tokens=2)
    driver.step()
    assert driver.reserve("r", [3]) == Refused("no_pages", "a queued request awaits pages")
    driver.scheduler.abort("big")
    assert isinstance(driver.reserve("r", [3]), Reservation)


def test_a_page_is_left_for_each_running_sequence() -> None:
    """A request that begins must not drive a running one out with its first step."""
    driver = Driver(num_pages=4)
    driver.add("a", [1] * 4, max_tokens=12)
    driver.step()
    driver.add("b", [2] * 4, max_tokens=2)
    driver.step()
    assert driver.scheduler.count(State.WAITING) == 1
    assert isinstance(driver.reserve("c", [3] * 4, max_tokens=2), Refused)


# --- ends ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "reason", "length"),
    [
        ({"max_tokens": 3, "ignore_eos": True}, "length", 3),
        ({"max_tokens": 300, "ignore_eos": True}, "length", 17),  # the context
        ({"max_tokens": 300, "ignore_eos": True, "stop_token_ids": (10,)}, "stop", 4),
    ],
)
def test_a_sequence_ends_at_its_limit_or_a_stop_token(changes: dict, reason: str, length: int) -> None:
    prompt = (1, 2, 3)
    expected = greedy(prompt, 17)
    assert expected.index(10) == 3
    driver = Driver(max_model_len=20)
    driver.add("a", prompt, **changes)
    events = driver.run()
    assert tokens_of(events, "a") == expected[:length]
    assert [e.finish_reason for e in events] == [None] * (length - 1) + [reason]
    assert driver.in_use == 0


@pytest.mark.parametrize("eos", [(10,), (4, 10), (10, 4)])
def test_any_of_several_end_tokens_ends_it(eos: tuple[int, ...]) -> None:
    driver = Driver(eos=eos)
    driver.add("a", (1, 2, 3), ignore_eos=False, max_tokens=50)
    events = driver.run()
    assert tokens_of(events, "a") == greedy((1, 2, 3), 4)
    assert events[-1].finish_reason == "stop"


def test_an_end_token_is_ignored_on_request() -> None:
    driver = Driver(eos=(10,))
    driver.add("a", (1, 2, 3), ignore_eos=True, max_tokens=6)
    assert len(tokens_of(driver.run(), "a")) == 6


def test_the_first_output_says_what_was_cached() -> None:
    driver = Driver()
    prompt = [1, 2, 3, 4, 5, 6, 7, 8, 9]
    driver.add("a", prompt, max_tokens=2)
    first = driver.run()
    driver.add("b", prompt, max_tokens=2)
    second = driver.run()
    assert [e.cached_tokens for e in first] == [0, None]
    assert [e.cached_tokens for e in second] == [8, None]
    assert tokens_of(first, "a") == tokens_of(second, "b")
    assert (driver.scheduler.num_prompt_tokens, driver.scheduler.num_cached_tokens) == (18, 8)


def test_a_whole_cached_prompt_still_computes_its_last_page() -> None:
    """Logits need a token to come from."""
    driver = Driver()
    prompt = [1, 2, 3, 4, 5, 6, 7, 8]
    driver.add("a", prompt, max_tokens=2)
    driver.run()
    driver.add("b", prompt, max_tokens=2)
    plan = driver.scheduler.plan()
    assert lens(plan) == [4]


def test_a_replay_goes_on_where_the_output_broke_off() -> None:
    prompt = [1, 2, 3, 4, 5]
    whole = greedy(prompt, 8)
    driver = Driver()
    driver.add("a", prompt + whole[:3], num_prompt_tokens=5, max_tokens=8)
    events = driver.run()
    assert [e.position for e in events] == [3, 4, 5, 6, 7]
    assert tokens_of(events, "a") == whole[3:]
    assert events[-1].finish_reason == "length"


# --- aborts ----------------------------------------------------------------------------------------


def test_abort_frees_at_once_what_no_step_uses() -> None:
    driver = Driver(max_num_batched_tokens=8)
    driver.add("waits")
    driver.scheduler.abort("waits")
    assert driver.scheduler.num_queued_tokens == 0
    driver.add("prefills", range(11))
    driver.step()
    assert driver.in_use == 4
    driver.scheduler.abort("prefills")
    assert driver.in_use == 0
    driver.add("decodes")
    driver.step()
    driver.scheduler.abort("decodes")
    driver.scheduler.abort("decodes")
    driver.scheduler.abort("unknown")
    assert driver.in_use == 0
    assert driver.step() == []
    driver.scheduler.audit()


def test_abort_in_flight_frees_when_the_step_retires_and_tells_nothing() -> None:
    """Until then the step writes to those pages."""
    driver = Driver()
    driver.add("a")
    plan = driver.scheduler.plan()
    driver.scheduler.abort("a")
    assert driver.in_use == 2
    assert driver.scheduler._slots.num_free == 3
    driver.scheduler.audit()
    assert driver.scheduler.retire(plan, driver.runner.run(plan)) == []
    assert driver.in_use == 0
    assert driver.scheduler._slots.num_free == 4
    driver.scheduler.audit()


def test_an_id_can_be_used_again_while_its_aborted_step_is_in_flight() -> None:
    driver = Driver()
    driver.add("a")
    plan = driver.scheduler.plan()
    driver.scheduler.abort("a")
    assert driver.add("a", (4, 5)) == Added("a")
    assert driver.scheduler.retire(plan, driver.runner.run(plan)) == []
    assert tokens_of(driver.run(), "a") == greedy((4, 5), 8)
    assert driver.in_use == 0


def test_an_id_in_use_is_refused() -> None:
    driver = Driver()
    driver.add("a")
    assert driver.add("a") == Refused("invalid", "request a is known already")


def test_abort_can_keep_the_pages_until_release() -> None:
    """A push that still reads them is told to stop first."""
    driver = Driver(max_num_batched_tokens=8)
    driver.add("a", range(11), prefill_only=True)
    driver.step()
    driver.scheduler.abort("a", keep_pages=True)
    assert driver.in_use == 3
    assert driver.step() == []
    driver.scheduler.release("a")
    driver.scheduler.release("a")
    assert driver.in_use == 0


# --- ends ------------------------------------------------------------------------------------------


def test_a_sequence_ends_at_its_own_end_tokens_alone() -> None:
    """Also where a client names tokens that no model has."""
    driver = Driver()
    end = greedy((1, 2, 3), 3)[-1]
    driver.add("ends", stop_token_ids=(end, VOCAB, 2**31 - 1, -1))
    driver.add("goes on")
    events = driver.run()
    ends = [(e.request_id, e.position, e.finish_reason) for e in events if e.finish_reason]
    assert ends == [("ends", greedy((1, 2, 3), 8).index(end), "stop"), ("goes on", 7, "length")]


# --- out of pages ----------------------------------------------------------------------------------


def test_the_youngest_is_handed_back_when_pages_run_out() -> None:
    driver = Driver(num_pages=6)
    driver.add("old", (1, 2, 3), max_tokens=20)
    driver.add("young", (4, 5, 6), max_tokens=20)
    events = driver.run()
    ends = [(e.request_id, e.finish_reason) for e in events if e.finish_reason]
    assert ends == [("young", "handed_back"), ("old", "length")]
    emitted = tokens_of(events, "young")
    back = next(e for e in events if e.finish_reason == "handed_back")
    assert (back.token_ids, back.position) == ([], len(emitted))
    assert tokens_of(events, "old") == greedy((1, 2, 3), 20)
    assert driver.scheduler.num_handed_back == 1
    assert driver.in_use == 0
    # What the router does: the output is unchanged.
    driver.add("again", [4, 5, 6, *emitted], num_prompt_tokens=3, max_tokens=20)
    assert emitted + tokens_of(driver.run(), "again") == greedy((4, 5, 6), 20)


def test_a_sequence_that_is_the_youngest_itself_is_handed_back() -> None:
    driver = Driver(num_pages=6)
    driver.add("a", (1, 2, 3), max_tokens=20)
    driver.step()
    assert isinstance(driver.reserve("r", [5] * 5), Reservation)
    events = driver.run()
    assert [e.finish_reason for e in events if e.finish_reason] == ["handed_back"]
    assert driver.in_use == 3


def test_a_request_whose_pages_are_being_sent_is_not_handed_back() -> None:
    driver = Driver(num_pages=6, max_num_seqs=2, max_num_batched_tokens=2)
    driver.add("old", (1, 2, 3), max_tokens=20)
    driver.step()
    driver.step()
    # Computed a token a step, so it is in the middle when the older one finds no page.
    driver.add("push", [5] * 12, prefill_only=True)
    events = driver.run()
    ends = [(e.request_id, e.finish_reason) for e in events if getattr(e, "finish_reason", None)]
    assert ends == [("old", "handed_back")]
    chunks = [i for i, e in enumerate(events) if isinstance(e, ChunkDone)]
    end = next(i for i, e in enumerate(events) if getattr(e, "finish_reason", None))
    assert chunks[0] < end < chunks[-1], "it happened in between"
    assert any(isinstance(e, ChunkDone) and e.is_last for e in events)


# --- prefill only ------------------------------------------------------------------------------------


def test_chunks_tell_their_pages_and_the_last_one_keeps_them_until_release() -> None:
    driver = Driver(max_num_batched_tokens=9)
    prompt = [*range(10), 0]
    driver.add("a", prompt, prefill_only=True)
    (first,) = driver.step()
    token, last = driver.step()
    assert isinstance(first, ChunkDone)
    assert (first.num_computed, len(first.page_ids), first.is_last) == (8, 2, False)
    assert (token.token_ids, token.position, token.finish_reason) == (greedy(prompt, 1), 0, None)
    assert (last.num_computed, last.is_last) == (11, True)
    assert last.page_ids[:2] == first.page_ids
    assert len(last.page_ids) == 3
    assert driver.in_use == 3
    assert driver.step() == []
    assert driver.scheduler._slots.num_free == 4, "a held request runs no more"
    driver.scheduler.release("a")
    assert (driver.in_use, driver.cache.num_cached) == (0, 2)


def test_a_first_token_that_ends_the_sequence_says_so() -> None:
    prompt = (1, 2, 3)
    driver = Driver(eos=(greedy(prompt, 1)[0],))
    driver.add("a", prompt, prefill_only=True, ignore_eos=False)
    driver.add("b", prompt, prefill_only=True, max_tokens=1)
    reasons = [e.finish_reason for e in driver.step() if isinstance(e, SequenceOutput)]
    assert reasons == ["stop", "length"]


# --- reservations ------------------------------------------------------------------------------------


def test_a_reservation_decodes_once_its_kv_has_landed() -> None:
    driver = Driver()
    prompt = [1, 2, 3, 4, 5, 6]
    reservation = driver.reserve("a", prompt)
    assert reservation == Reservation("a", 0, reservation.page_ids, 0)
    assert len(reservation.page_ids) == 2
    assert driver.in_use == 3, "the prompt's pages and one for output"
    assert driver.step() == []
    driver.scheduler.start("a", driver.land(reservation, prompt), finished=False)
    events = driver.run()
    assert [e.position for e in events] == [1, 2, 3, 4, 5, 6, 7]
    assert [e.cached_tokens for e in events] == [None] * 7, "its prefill worker tells"
    assert greedy(prompt, 1) + tokens_of(events, "a") == greedy(prompt, 8)
    assert driver.in_use == 0


@pytest.mark.parametrize(("cap_match", "matched"), [(False, 2), (True, 1)])
def test_a_capped_match_leaves_the_last_page_to_transfer(cap_match: bool, matched: int) -> None:
    driver = Driver()
    prompt = [1, 2, 3, 4, 5, 6, 7, 8]
    driver.add("warm", prompt, max_tokens=2)
    driver.run()
    reservation = driver.reserve("a", prompt, cap_match)
    assert isinstance(reservation, Reservation)
    assert (reservation.first_missing_page, reservation.cached_tokens) == (matched, matched * 4)
    token = driver.land(reservation, prompt)
    driver.scheduler.start("a", token, finished=False)
    assert [token, *tokens_of(driver.run(), "a")] == greedy(prompt, 8)


def test_a_reservation_whose_first_token_was_the_last_keeps_only_the_cache() -> None:
    driver = Driver()
    reservation = driver.reserve("a", [1, 2, 3, 4, 5])
    driver.scheduler.start("a", driver.land(reservation, [1, 2, 3, 4, 5]), finished=True)
    assert driver.scheduler.take_events() == []
    assert (driver.in_use, driver.cache.num_cached) == (0, 1)


def test_workers_that_disagree_about_end_tokens_do_not_hang_the_client() -> None:
    driver = Driver(eos=(EOS,))
    driver.reserve("a", [1, 2, 3], ignore_eos=False)
    driver.scheduler.start("a", EOS, finished=False)
    (end,) = driver.step()
    assert (end.token_ids, end.position, end.finish_reason) == ([], 1, "stop")
    assert driver.in_use == 0


@pytest.mark.parametrize("token_id", [-1, VOCAB, 2**40])
def test_a_token_of_another_vocabulary_ends_the_sequence_not_the_engine(token_id: int) -> None:
    """It comes from another process, whose model may have pages of the same shape."""
    driver = Driver()
    driver.reserve("a", [1, 2, 3, 4, 5])
    driver.scheduler.start("a", token_id, finished=False)
    (end,) = driver.step()
    assert (end.token_ids, end.finish_reason) == ([], "error")
    assert (driver.in_use, driver.cache.num_cached) == (0, 0)


def test_a_start_after_the_abort_does_nothing() -> None:
    driver = Driver()
    driver.reserve("a", [1, 2, 3])
    driver.scheduler.abort("a")
    driver.scheduler.start("a", 5, finished=False)
    assert driver.step() == []
    assert driver.in_use == 0


def test_reservations_wait_for_slots_not_for_each_other() -> None:
    driver = Driver(max_num_seqs=2, num_pages=32)
    for name in "ab":
        reservation = driver.reserve(name, [1, 2, 3])
        driver.scheduler.start(name, driver.land(reservation, [1, 2, 3]), finished=False)
    assert isinstance(driver.reserve("c", [1]), Refused), "as many as can run next"
    driver.step()
    assert isinstance(driver.reserve("c", [1]), Reservation)


def test_a_reservation_is_refused_whole_when_pages_are_short() -> None:
    driver = Driver(num_pages=4)
    assert isinstance(driver.reserve("a", [1] * 8), Reservation)
    refused = driver.reserve("b", [2] * 8)
    assert refused == Refused("no_pages", "1 pages are available")
    assert driver.in_use == 3
    driver.scheduler.audit()


def test_quarantined_pages_are_given_to_nobody_until_they_are_fenced() -> None:
    driver = Driver(num_pages=4)
    reservation = driver.reserve("a", [1] * 8)
    pages = driver.scheduler.quarantine("a")
    assert pages == reservation.page_ids
    assert (driver.in_use, driver.scheduler.num_quarantined) == (2, 2)
    assert isinstance(driver.reserve("b", [2] * 12, max_tokens=2), Refused)
    driver.scheduler.audit()
    driver.scheduler.unquarantine(pages)
    assert driver.in_use == 0
    assert isinstance(driver.reserve("b", [2] * 12, max_tokens=2), Reservation)


def test_only_missing_pages_are_quarantined() -> None:
    """Matched ones were never anybody's target, and others are reading them."""
    driver = Driver()
    prompt = [1, 2, 3, 4, 5, 6, 7, 8]
    driver.add("warm", prompt, max_tokens=2)
    driver.run()
    reservation = driver.reserve("a", prompt, cap_match=True)
    assert driver.scheduler.quarantine("a") == reservation.page_ids[1:]
    assert (driver.in_use, driver.cache.num_cached) == (1, 2)


def test_quarantine_of_what_has_started_is_an_abort() -> None:
    driver = Driver()
    reservation = driver.reserve("a", [1, 2, 3])
    driver.scheduler.start("a", driver.land(reservation, [1, 2, 3]), finished=False)
    assert driver.scheduler.quarantine("a") == []
    assert driver.scheduler.quarantine("unknown") == []
    assert driver.in_use == 0


def test_unquarantine_of_other_pages_is_a_bug() -> None:
    driver = Driver()
    with pytest.raises(InvariantBroken, match=r"not quarantined: \[3\]"):
        driver.scheduler.unquarantine([3])


# --- limits ------------------------------------------------------------------------------------------


def test_the_queue_is_bounded_by_tokens_but_takes_one_whatever_its_length() -> None:
    driver = Driver(max_queued_tokens=8, num_pages=64)
    assert driver.add("a", [1] * 20) == Added("a")
    assert driver.add("b", [1]) == Refused("queue_full", "20 prompt tokens wait already")
    driver.step()
    assert driver.add("b", [1] * 8) == Added("b")
    assert driver.add("c", [1]) == Refused("queue_full", "8 prompt tokens wait already")


def test_queued_tokens_count_down_as_chunks_retire() -> None:
    driver = Driver(max_num_batched_tokens=8)
    driver.add("a", range(11))
    driver.add("b")
    assert driver.scheduler.num_queued_tokens == 14
    driver.step()
    assert driver.scheduler.num_queued_tokens == 6
    driver.step()
    assert driver.scheduler.num_queued_tokens == 0


def test_steps_retire_in_order_with_all_their_samples() -> None:
    driver = Driver()
    driver.add("a")
    first = driver.scheduler.plan()
    second = driver.scheduler.plan()
    with pytest.raises(InvariantBroken, match="step 1 awaits"):
        driver.scheduler.retire(second, [1])
    driver = Driver()
    driver.add("a")
    first = driver.scheduler.plan()
    with pytest.raises(InvariantBroken, match="with 0 samples"):
        driver.scheduler.retire(first, [])


def test_a_plan_holds_each_samples_parameters_at_its_output_position() -> None:
    driver = Driver()
    driver.add("greedy", (1, 2, 3), temperature=0.0)
    driver.add(
        "drawn",
        (4, 5),
        num_prompt_tokens=1,
        temperature=0.5,
        top_k=7,
        top_p=0.9,
        min_p=0.1,
        seed=2**64 - 1,
        choice_index=3,
    )
    samples = driver.scheduler.plan().samples
    assert int32s(samples.rows).tolist() == [0, 1]
    assert int32s(samples.position).tolist() == [0, 1]
    assert int32s(samples.choice_index).tolist() == [0, 3]
    assert int32s(samples.top_k).tolist() == [0, 7]
    for column, expected in (("temperature", (0, 0.5)), ("top_p", (1, 0.9)), ("min_p", (0, 0.1))):
        np.testing.assert_array_equal(
            np.frombuffer(getattr(samples, column), np.float32), np.array(expected, np.float32)
        )
    assert np.frombuffer(samples.seed, np.uint64).tolist() == [0, 2**64 - 1]
