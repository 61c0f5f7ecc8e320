"""One sequence through every outcome, message by message."""

from collections.abc import Callable

import pytest

from disagg.errors import WorkerError
from disagg.protocol import (
    Abort,
    Fenced,
    FinishReason,
    FirstToken,
    Generate,
    Prefill,
    Rejected,
    Release,
    Reserve,
    SequenceTokens,
    Tokens,
)
from disagg.router.sequence import ANSWER_TIMEOUT_S, KV_GRACE_S, STALL_TIMEOUT_S
from support.router import Actor, Client, Harness


@pytest.fixture
def pair(router: Harness) -> tuple[Actor, Actor]:
    return router.add("prefill"), router.add("decode")


def start(prefill: Actor, decode: Actor) -> Prefill:
    """Take one sequence as far as its prefill."""
    decode.reserve()
    message = prefill.take(Prefill)
    prefill.accept(message)
    return message


def decoding(prefill: Actor, decode: Actor, token_id: int = 10) -> Prefill:
    """Take one sequence as far as decode."""
    message = start(prefill, decode)
    prefill.first(message, token_id)
    prefill.done(message)
    decode.received(message)
    prefill.take(Release)
    return message


# --- what is meant to happen -------------------------------------------------------------------


def test_a_disaggregated_sequence_is_reserved_prefilled_decoded_and_released(
    router: Harness, pair: tuple[Actor, Actor]
) -> None:
    prefill, decode = pair
    client = router.submit(40, max_tokens=3)
    reserve = decode.take(Reserve)
    assert (reserve.generation, len(reserve.token_ids), reserve.num_prompt_tokens) == (0, 40, 40)
    assert reserve.cap_match, "always leaves a page to move"
    decode.link.sent.append(reserve)
    message = start(prefill, decode)
    assert (message.target.uuid, message.target.page_ids) == (decode.uuid, [0, 1, 2])
    prefill.first(message, 10, cached=16)
    assert client.tokens == [10]
    prefill.done(message, 300)
    decode.received(message, 300)
    assert prefill.sent() == [Release(message.transfer_id, 0)]
    decode.tokens(message, 1, 11)
    decode.tokens(message, 2, 12, finish="length")
    assert client.tokens == [10, 11, 12]
    assert client.finish_reason == "length"
    assert decode.sent() == [Release(message.transfer_id, 0)]
    record = client.record()
    assert record["decision"] == "disaggregated"
    assert record["kv"] == {
        "pages": 1,
        "bytes_expected": 300,
        "bytes_received": 300,
        "transport": "fake",
        "seconds": 0.003,
    }
    assert (record["attempts"], record["release"], record["completion_tokens"]) == (1, "finished", 3)
    assert client.cached == {0: 16}


def test_the_first_token_does_not_wait_for_the_kv(router: Harness, pair: tuple[Actor, Actor]) -> None:
    prefill, decode = pair
    client = router.submit()
    prefill.first(start(prefill, decode), 10)
    assert client.tokens == [10]
    assert router.dispatcher.leases_by_state()["transfer"] == 1


def test_a_local_sequence_is_generated_by_one_worker(router: Harness, pair: tuple[Actor, Actor]) -> None:
    _, decode = pair
    client = router.submit(40, max_tokens=2, override="never")
    message = decode.take(Generate)
    decode.accept(message, 16)
    decode.tokens(message, 0, 10, cached=16)
    decode.tokens(message, 1, 11, finish="length")
    assert client.tokens == [10, 11]
    assert client.cached == {0: 16}
    assert decode.sent() == [Release(message.transfer_id, 0)]
    record = client.record()
    assert (record["decision"], record["prefill_worker"]) == ("local", None)
    assert record["cached_tokens"] == {"prefill": 0, "decode": 16}
    assert router.sample("disagg_silent_local_total") == 0


def test_what_should_be_disaggregated_and_is_not_is_counted(router: Harness) -> None:
    decode = router.add("decode")
    client = router.submit()
    decode.take(Generate)
    assert client.record()["reason"] == "no prefill worker"
    assert router.sample("disagg_silent_local_total") == 1


def test_each_choice_draws_for_itself(router: Harness, pair: tuple[Actor, Actor]) -> None:
    _, decode = pair
    router.submit(n=2, prompts=[[1, 2], [3, 4]])
    sent = [decode.take(Reserve) for _ in range(4)]
    assert [(m.token_ids, m.sampling.choice_index) for m in sent] == [
        ([1, 2], 0),
        ([1, 2], 1),
        ([3, 4], 0),
        ([3, 4], 1),
    ]
    assert len({m.transfer_id for m in sent}) == 4


def test_a_sequence_that_ends_at_its_first_token_waits_for_its_kv(
    router: Harness, pair: tuple[Actor, Actor]
) -> None:
    """Else its record would say that bytes are missing, and decode would drop what is on its way."""
    prefill, decode = pair
    client = router.submit(max_tokens=1)
    message = start(prefill, decode)
    prefill.first(message, 10, finish="length")
    assert (client.tokens, client.finish_reason) == ([10], None)
    prefill.done(message)
    decode.received(message)
    assert client.finish_reason == "length"
    assert client.record()["kv"]["bytes_received"] == 100
    assert decode.sent() == [Release(message.transfer_id, 0)]


def test_waiting_for_the_kv_of_an_ended_sequence_is_bounded(
    router: Harness, pair: tuple[Actor, Actor]
) -> None:
    prefill, decode = pair
    client = router.submit(max_tokens=1)
    message = start(prefill, decode)
    prefill.first(message, 10, finish="length")
    router.advance(KV_GRACE_S + 1)
    assert client.finish_reason == "length"
    assert client.record()["release"] == "aborted"
    assert prefill.sent() == [Abort(message.transfer_id, 0)]
    assert Abort(message.transfer_id, 0) in decode.sent()


def test_a_sequence_that_has_its_last_token_is_not_tried_again(
    router: Harness, pair: tuple[Actor, Actor]
) -> None:
    """Another attempt would make a token more."""
    prefill, decode = pair
    client = router.submit(max_tokens=1)
    message = start(prefill, decode)
    prefill.first(message, 10, finish="length")
    prefill.die()
    assert (client.tokens, client.finish_reason) == ([10], "length")
    assert decode.sent() == [Abort(message.transfer_id, 0)]


def test_the_duration_of_a_transfer_is_noted_when_it_comes_after_the_end(
    router: Harness, pair: tuple[Actor, Actor]
) -> None:
    prefill, decode = pair
    client = router.submit(max_tokens=1)
    message = start(prefill, decode)
    prefill.first(message, 10, finish="length")
    decode.received(message)
    assert client.finish_reason == "length"
    prefill.done(message)
    assert client.record()["kv"]["seconds"] == 0.003


# --- messages that come twice, late, early or never --------------------------------------------


def test_tokens_that_were_seen_are_dropped_by_position(router: Harness, pair: tuple[Actor, Actor]) -> None:
    prefill, decode = pair
    client = router.submit(max_tokens=9)
    message = decoding(prefill, decode)
    decode.tokens(message, 0, 10, 11)
    decode.tokens(message, 1, 11, 12)
    decode.tokens(message, 1, 11)
    assert client.tokens == [10, 11, 12]


def test_tokens_of_decode_that_overtake_the_first_one_wait_for_it(
    router: Harness, pair: tuple[Actor, Actor]
) -> None:
    prefill, decode = pair
    client = router.submit(max_tokens=3)
    message = start(prefill, decode)
    decode.received(message)
    decode.tokens(message, 1, 11)
    decode.tokens(message, 2, 12, finish="length")
    assert client.tokens == []
    prefill.first(message, 10)
    assert (client.tokens, client.finish_reason) == ([10, 11, 12], "length")


def test_a_hole_in_the_output_is_made_again(router: Harness, pair: tuple[Actor, Actor]) -> None:
    prefill, decode = pair
    client = router.submit(max_tokens=9)
    message = decoding(prefill, decode)
    decode.tokens(message, 2, 12)
    assert client.tokens == [10]
    assert decode.take(Abort).generation == 0
    assert decode.take(Reserve).token_ids[40:] == [10]
    assert client.record()["failures"] == ["tokens were lost"]


def test_messages_of_an_old_generation_change_nothing(router: Harness, pair: tuple[Actor, Actor]) -> None:
    prefill, decode = pair
    client = router.submit(max_tokens=9)
    old = start(prefill, decode)
    router.advance(1000)  # the prefill does not come
    assert decode.take(Abort).generation == 0
    new = decode.reserve()
    assert new.generation == 1
    prefill.first(old, 66)
    prefill.done(old)
    decode.received(old)
    decode.tokens(old, 0, 66, 67)
    assert client.tokens == []
    assert client.record()["kv"]["bytes_received"] == 0


def test_messages_of_a_worker_that_has_no_part_in_it_change_nothing(
    router: Harness, pair: tuple[Actor, Actor]
) -> None:
    prefill, decode = pair
    other = router.add("decode")
    client = router.submit(max_tokens=9)
    taker, idle = (decode, other) if decode.link.sent else (other, decode)
    message = decoding(prefill, taker)
    idle.tokens(message, 1, 66)
    idle.received(message)
    assert client.tokens == [10]


@pytest.mark.parametrize("stage", ["reserve", "prefill", "transfer", "decode"])
def test_an_answer_that_never_comes_is_given_up(
    router: Harness, pair: tuple[Actor, Actor], stage: str
) -> None:
    _prefill, decode = pair
    router.add("prefill")
    client = router.submit(max_tokens=9)
    reach(stage, router, client)
    router.advance(1000)
    assert client.record()["failures"] == [f"timeout in {stage}"]
    assert router.sample("disagg_retries_total", stage=stage) == 1
    assert any(isinstance(m, Reserve) and m.generation == 1 for m in decode.sent())


def reach(stage: str, router: Harness, client: Client) -> None:
    """Bring the only sequence to a stage, on whatever workers it was placed."""
    if stage == "queued":
        return
    record = client.record()
    decode = router.actors[record["decode_worker"]]
    if stage == "local":
        decode.accept(decode.take(Generate))
        return
    prefill = router.actors[record["prefill_worker"]]
    if stage == "reserve":
        decode.take(Reserve)
        return
    message = start(prefill, decode)
    if stage == "prefill":
        return
    prefill.first(message, 10)
    if stage == "transfer":
        return
    prefill.done(message)
    decode.received(message)
    prefill.take(Release)


# --- refusals ----------------------------------------------------------------------------------


def test_a_worker_without_room_is_asked_again_when_it_tells_of_room(
    router: Harness, pair: tuple[Actor, Actor]
) -> None:
    _, decode = pair
    client = router.submit()
    for _ in range(20):  # far more often than attempts may fail
        decode.reject(Reserve, "no_pages")
        assert not decode.sent(), "it has just said no"
        decode.tell_load()
    assert decode.take(Reserve).generation == 20
    assert client.error is None
    record = client.record()
    assert (record["attempts"], record["failures"]) == (1, []), "waiting for room is no attempt"
    assert record["phases"]["queue_s"] == 0


def test_another_worker_is_asked_at_once(router: Harness, pair: tuple[Actor, Actor]) -> None:
    _, decode = pair
    other = router.add("decode")
    router.submit()
    asked, idle = (decode, other) if decode.link.sent else (other, decode)
    asked.reject(Reserve, "draining")
    assert idle.take(Reserve).generation == 1


def test_what_no_worker_can_hold_fails(router: Harness, pair: tuple[Actor, Actor]) -> None:
    _, decode = pair
    client = router.submit()
    decode.reject(Reserve, "too_long")
    client.read()
    assert isinstance(client.error, WorkerError)
    assert client.record()["finish_reason"] == "error"


def test_a_refused_prefill_frees_the_reservation(router: Harness, pair: tuple[Actor, Actor]) -> None:
    """Nothing was written, so decode hears at once that nothing will be."""
    prefill, decode = pair
    other = router.add("prefill")
    router.submit()
    decode.reserve()
    asked, idle = (prefill, other) if prefill.link.sent else (other, prefill)
    message = asked.reject(Prefill, "queue_full")
    key = (message.transfer_id, 0)
    assert decode.take(Abort) == Abort(*key)
    assert decode.take(Fenced) == Fenced(*key)
    decode.reserve()
    assert idle.take(Prefill).generation == 1
    assert asked.sent() == []


def test_workers_that_cannot_exchange_kv_are_not_paired_again(
    router: Harness, pair: tuple[Actor, Actor]
) -> None:
    prefill, decode = pair
    client = router.submit()
    decode.reserve()
    prefill.reject(Prefill, "layout_mismatch")
    decode.take(Abort)
    decode.take(Fenced)
    assert decode.take(Generate).generation == 1, "the only pair cannot: it goes on where it can"
    assert client.record()["reason"] == "no pair can exchange KV"
    assert router.sample("disagg_silent_local_total") == 1


def test_a_failed_push_that_is_fenced_frees_the_pages_at_once(
    router: Harness, pair: tuple[Actor, Actor]
) -> None:
    from disagg.protocol import Failed

    prefill, decode = pair
    client = router.submit()
    message = start(prefill, decode)
    prefill.first(message, 10)
    prefill.say(Failed(message.transfer_id, 0, "deadline passed: 60 s", fenced=True))
    assert decode.sent()[:2] == [Abort(message.transfer_id, 0), Fenced(message.transfer_id, 0)]
    assert prefill.sent() == []
    assert client.tokens == [10]
    assert router.sample("disagg_kv_transfer_failures_total", reason="deadline passed") == 1


def test_a_failed_push_that_is_not_fenced_is_passed_on_when_it_is(
    router: Harness, pair: tuple[Actor, Actor]
) -> None:
    from disagg.protocol import Failed

    prefill, decode = pair
    router.submit()
    message = start(prefill, decode)
    prefill.say(Failed(message.transfer_id, 0, "expired", fenced=False))
    assert Fenced(message.transfer_id, 0) not in decode.sent()
    prefill.say(Fenced(message.transfer_id, 0))
    assert decode.take(Fenced) == Fenced(message.transfer_id, 0)


def test_a_sequence_that_is_handed_back_goes_on_where_it_was(
    router: Harness, pair: tuple[Actor, Actor]
) -> None:
    prefill, decode = pair
    client = router.submit(max_tokens=9)
    message = decoding(prefill, decode)
    decode.tokens(message, 1, 11)
    decode.tokens(message, 2, 12, finish="handed_back")
    assert not decode.sent(), "it is full until it says otherwise, and has let go already"
    decode.tell_load()
    reserve = decode.reserve()
    assert (reserve.generation, reserve.token_ids[40:], reserve.num_prompt_tokens) == (1, [10, 11, 12], 40)
    replay = prefill.take(Prefill)
    prefill.first(replay, 13)
    prefill.done(replay)
    decode.received(replay)
    decode.tokens(replay, 4, 14, finish="stop")
    assert client.tokens == [10, 11, 12, 13, 14]
    record = client.record()
    assert (record["attempts"], record["failures"]) == (2, ["handed_back"])
    assert record["kv"]["bytes_received"] == record["kv"]["bytes_expected"] == 200


def test_a_sequence_that_is_handed_back_without_progress_is_not_tried_for_ever(
    router: Harness, pair: tuple[Actor, Actor]
) -> None:
    _, decode = pair
    client = router.submit(override="never")
    for _ in range(5):
        message = decode.take(Generate)
        decode.tokens(message, 0, finish="handed_back")
        decode.tell_load()
    client.read()
    assert isinstance(client.error, WorkerError)


# --- workers that die --------------------------------------------------------------------------


@pytest.mark.parametrize("stage", ["reserve", "prefill", "transfer"])
def test_another_prefill_worker_takes_over(router: Harness, stage: str) -> None:
    first, second, decode = router.add("prefill"), router.add("prefill"), router.add("decode")
    client = router.submit(max_tokens=3)
    dying = router.actors[client.record()["prefill_worker"]]
    heir = second if dying is first else first
    reach(stage, router, client)
    transfer_id = "r1-0"
    dying.die()
    told = [m for m in decode.sent() if not isinstance(m, Reserve) or m.generation]
    assert told[0] == Abort(transfer_id, 0)
    # Before the prompt was sent nobody can write; afterwards that has to be proven first.
    assert (told[1] == Fenced(transfer_id, 0)) == (stage == "reserve")
    reserve = told[-1]
    assert isinstance(reserve, Reserve)
    assert reserve.generation == 1
    decode.link.sent.append(reserve)
    decode.reserve()
    message = heir.take(Prefill)
    position = len(message.token_ids) - 40
    assert message.token_ids[40:] == client.tokens
    heir.first(message, 10 + position)
    heir.done(message)
    decode.received(message)
    for token in range(11 + position, 13):
        decode.tokens(message, token - 10, token, finish="length" if token == 12 else None)
    assert client.tokens == [10, 11, 12]
    assert router.sample("disagg_retries_total", stage=stage) == 1
    assert router.sample("disagg_workers_lost_total", role="prefill") == 1


def test_decode_is_told_of_the_fence_only_once_the_process_is_proven_gone(
    router: Harness, pair: tuple[Actor, Actor]
) -> None:
    """A broken link does not stop writes into the pages."""
    prefill, decode = pair
    router.submit()
    message = start(prefill, decode)
    prefill.die()
    router.advance(1.0)
    assert Fenced(message.transfer_id, 0) not in decode.sent()
    prefill.proof.gone = True
    router.advance(0.1)
    assert Fenced(message.transfer_id, 0) in decode.sent()


def test_a_prefill_worker_that_comes_back_is_told_to_stop_and_its_fence_is_passed_on(
    router: Harness, pair: tuple[Actor, Actor]
) -> None:
    prefill, decode = pair
    router.submit()
    message = start(prefill, decode)
    prefill.die()
    decode.sent()
    prefill.join()  # the same process: only the link was gone
    assert prefill.take(Abort) == Abort(message.transfer_id, 0)
    prefill.say(Fenced(message.transfer_id, 0))
    assert Fenced(message.transfer_id, 0) in decode.sent()


def test_the_death_of_prefill_after_the_kv_has_no_effect(router: Harness, pair: tuple[Actor, Actor]) -> None:
    prefill, decode = pair
    client = router.submit(max_tokens=2)
    message = decoding(prefill, decode)
    prefill.die()
    assert decode.sent() == []
    decode.tokens(message, 1, 11, finish="length")
    assert (client.tokens, client.record()["attempts"]) == ([10, 11], 1)


def test_the_death_of_prefill_between_its_last_write_and_decodes_word_is_waited_out(
    router: Harness, pair: tuple[Actor, Actor]
) -> None:
    prefill, decode = pair
    client = router.submit(max_tokens=2)
    message = start(prefill, decode)
    prefill.first(message, 10)
    prefill.done(message)
    prefill.die()
    assert decode.sent() == []
    decode.received(message)
    decode.tokens(message, 1, 11, finish="length")
    assert (client.tokens, client.record()["attempts"]) == ([10, 11], 1)


def test_a_first_token_that_died_with_prefill_is_made_again(
    router: Harness, pair: tuple[Actor, Actor]
) -> None:
    """Decode begins at the second one, and nobody else knows the first."""
    prefill, decode = pair
    client = router.submit(max_tokens=2)
    message = start(prefill, decode)
    decode.received(message)
    decode.tokens(message, 1, 11)
    prefill.die()
    assert decode.sent()[0] == Abort(message.transfer_id, 0)
    assert client.tokens == []
    prefill.restart()
    assert client.record()["failures"] == ["prefill-0 was lost"]


@pytest.mark.parametrize("stage", ["prefill", "transfer"])
def test_the_same_prefill_worker_goes_on_for_another_decode_worker(router: Harness, stage: str) -> None:
    """It keeps what it has computed until the new attempt is there to use it."""
    prefill = router.add("prefill")
    other, first, second = router.add("prefill"), router.add("decode"), router.add("decode")
    client = router.submit(200, max_tokens=3)
    record = client.record()
    keeper = router.actors[record["prefill_worker"]]
    idle = other if keeper is prefill else prefill
    dying = router.actors[record["decode_worker"]]
    heir = second if dying is first else first
    reach(stage, router, client)
    dying.die()
    assert keeper.sent() == [], "it goes on"
    heir.reserve()
    message = keeper.take(Prefill)
    assert (message.generation, message.target.uuid) == (1, heir.uuid)
    assert keeper.sent() == [Abort(message.transfer_id, 0)], "after the new one, which has its pages locked"
    assert idle.sent() == []
    position = len(message.token_ids) - 200
    keeper.first(message, 10 + position)
    keeper.done(message)
    heir.received(message)
    heir.tokens(message, position + 1, *range(11 + position, 13), finish="length")
    assert client.tokens == [10, 11, 12]


def test_a_first_token_that_comes_while_no_decode_worker_is_there_reaches_the_client(
    router: Harness, pair: tuple[Actor, Actor]
) -> None:
    prefill, decode = pair
    client = router.submit(max_tokens=3)
    message = start(prefill, decode)
    decode.die()
    prefill.first(message, 10)
    assert client.tokens == [10]
    decode.restart()
    assert decode.reserve().token_ids[40:] == [10]


def test_a_sequence_that_needs_no_decode_worker_any_more_ends_without_one(
    router: Harness, pair: tuple[Actor, Actor]
) -> None:
    prefill, decode = pair
    client = router.submit(max_tokens=1)
    message = start(prefill, decode)
    decode.die()
    prefill.first(message, 10, finish="length")
    assert (client.tokens, client.finish_reason) == ([10], "length")
    assert prefill.sent() == [Abort(message.transfer_id, 0)]


def test_what_a_prefill_worker_kept_is_let_go_when_the_client_leaves(
    router: Harness, pair: tuple[Actor, Actor]
) -> None:
    prefill, decode = pair
    client = router.submit()
    message = start(prefill, decode)
    decode.die()
    client.leave()
    assert prefill.sent() == [Abort(message.transfer_id, 0)]


def test_what_a_prefill_worker_kept_survives_a_refusal_by_the_next_decode_worker(
    router: Harness, pair: tuple[Actor, Actor]
) -> None:
    prefill, decode = pair
    client = router.submit()
    start(prefill, decode)
    decode.die()
    decode.restart()
    decode.reject(Reserve, "no_pages")
    assert prefill.sent() == []
    client.leave()
    assert prefill.sent() == [Abort("r1-0", 0)]


def test_a_stream_goes_on_when_its_decode_worker_dies(router: Harness) -> None:
    """No token is lost, repeated or changed."""
    prefill, first, second = router.add("prefill"), router.add("decode"), router.add("decode")
    client = router.submit(max_tokens=5)
    dying = first if first.link.sent else second
    heir = second if dying is first else first
    message = decoding(prefill, dying)
    dying.tokens(message, 1, 11, 12)
    dying.die()
    replay = heir.reserve()
    assert (replay.generation, replay.token_ids[40:]) == (1, [10, 11, 12])
    message = prefill.take(Prefill)
    prefill.first(message, 13)
    heir.received(message)
    heir.tokens(message, 4, 14, finish="length")
    assert client.tokens == [10, 11, 12, 13, 14]
    assert client.record()["attempts"] == 2
    assert client.cached == {0: 0}


def test_both_workers_die(router: Harness, pair: tuple[Actor, Actor]) -> None:
    prefill, decode = pair
    client = router.submit(max_tokens=3)
    message = start(prefill, decode)
    prefill.first(message, 10)
    decode.die()
    prefill.die()
    prefill.restart()
    decode.restart()
    message = start(prefill, decode)
    assert message.token_ids[40:] == [10]
    prefill.first(message, 11)
    decode.received(message)
    decode.tokens(message, 2, 12, finish="length")
    assert client.tokens == [10, 11, 12]


def test_a_restarted_worker_is_told_nothing_of_what_its_predecessor_had(
    router: Harness, pair: tuple[Actor, Actor]
) -> None:
    prefill, decode = pair
    client = router.submit()
    start(prefill, decode)
    decode.die()
    client.leave()
    decode.restart()
    assert decode.sent() == []
    decode.die()
    decode.join()
    assert decode.sent() == [], "not even when the new one comes back"


def test_a_fence_that_cannot_be_proven_is_given_up_when_another_process_has_the_address(
    router: Harness,
) -> None:
    """Decode goes on asking by itself; the router's list must not grow for ever."""
    router.unproven.add("prefill-0")
    prefill, decode = router.add("prefill"), router.add("decode")
    router.submit()
    start(prefill, decode)
    prefill.die()
    router.advance(1.0)
    assert len(router.dispatcher.fences) == 1
    prefill.restart()
    assert len(router.dispatcher.fences) == 0


def test_attempts_are_limited(router: Harness, pair: tuple[Actor, Actor]) -> None:
    _, decode = pair
    client = router.submit(override="never")
    for _ in range(5):
        decode.take(Generate)
        decode.die()
        decode.restart()
    client.read()
    assert isinstance(client.error, WorkerError)
    record = client.record()
    assert (record["attempts"], record["finish_reason"], record["release"]) == (5, "error", "worker_lost")
    assert len(record["failures"]) == 5


# --- clients that leave ------------------------------------------------------------------------

LEAVING: list[tuple[str, Callable[[str], list[object]], Callable[[str], list[object]]]] = [
    ("reserve", lambda _: [], lambda t: [Abort(t, 0), Fenced(t, 0)]),
    ("prefill", lambda t: [Abort(t, 0)], lambda t: [Abort(t, 0)]),
    ("transfer", lambda t: [Abort(t, 0)], lambda t: [Abort(t, 0)]),
    ("decode", lambda _: [], lambda t: [Abort(t, 0)]),
    ("local", lambda _: [], lambda t: [Abort(t, 0)]),
]


@pytest.mark.parametrize(("stage", "to_prefill", "to_decode"), LEAVING, ids=[row[0] for row in LEAVING])
def test_a_client_that_leaves_frees_both_sides(
    router: Harness,
    pair: tuple[Actor, Actor],
    stage: str,
    to_prefill: Callable[[str], list[object]],
    to_decode: Callable[[str], list[object]],
) -> None:
    prefill, decode = pair
    client = router.submit(override="never" if stage == "local" else None)
    reach(stage, router, client)
    client.leave()
    assert prefill.sent() == to_prefill("r1-0")
    assert decode.sent() == to_decode("r1-0")
    record = client.record()
    assert (record["finish_reason"], record["release"]) == ("abort", "aborted")
    if stage in ("prefill", "transfer"):
        prefill.say(Fenced("r1-0", 0))
        assert decode.sent() == [Fenced("r1-0", 0)]


def test_what_arrives_for_a_client_that_has_left_changes_nothing(
    router: Harness, pair: tuple[Actor, Actor]
) -> None:
    prefill, decode = pair
    client = router.submit()
    message = start(prefill, decode)
    client.leave()
    before = client.record()
    key = (message.transfer_id, 0)
    prefill.say(FirstToken(*key, 0, 10, None, 0, 0.0, 0.0))
    decode.say(Tokens([SequenceTokens(*key, 1, [11])]), Rejected(*key, "no_pages"))
    assert client.record() == before


def test_a_client_that_leaves_the_queue_was_never_placed(router: Harness) -> None:
    router.add("prefill")
    decode = router.add("decode", max_num_seqs=1)
    router.submit()
    waiting = router.submit()
    decode.take(Reserve)
    waiting.leave()
    record = waiting.record()
    assert (record["decision"], record["finish_reason"], record["release"]) == (None, "abort", "aborted")
    assert (record["attempts"], record["predicted"]) == (0, None)
    assert decode.sent() == []


def test_one_choice_that_stops_leaves_the_others(router: Harness, pair: tuple[Actor, Actor]) -> None:
    _, decode = pair
    client = router.submit(n=2, max_tokens=2, override="never")
    first, second = decode.take(Generate), decode.take(Generate)
    decode.tokens(first, 0, 10)
    decode.tokens(second, 0, 20)
    client.ticket.stop_sequence(0, 1)
    assert decode.sent() == [Abort(first.transfer_id, 0)]
    decode.tokens(first, 1, 11, finish="length")
    decode.tokens(second, 1, 21, finish="length")
    client.read()
    assert (client.output, client.finish) == ({1: [20, 21]}, {1: "length"})
    record = client.record()
    assert [s["finish_reason"] for s in record["sequences"]] == ["stop", "length"]
    assert [s["release"] for s in record["sequences"]] == ["cancelled", "finished"]
    assert (record["completion_tokens"], record["finish_reason"]) == (3, "length")


@pytest.mark.parametrize("finish", [None, "length"])
def test_the_record_ends_at_the_stop_string_as_the_client_does(
    router: Harness, pair: tuple[Actor, Actor], finish: FinishReason | None
) -> None:
    """Tokens of one frame go on behind it, and the last of them may have ended the sequence."""
    _, decode = pair
    client = router.submit(max_tokens=4, override="never")
    decode.tokens(decode.take(Generate), 0, 10, 11, 12, 13, finish=finish)
    client.ticket.stop_sequence(0, 2)
    record = client.record()
    assert (record["completion_tokens"], record["finish_reason"]) == (2, "stop")
    assert record["release"] == ("finished" if finish else "cancelled")


def test_timeouts_leave_room_for_slow_machines() -> None:
    assert KV_GRACE_S < ANSWER_TIMEOUT_S < STALL_TIMEOUT_S
