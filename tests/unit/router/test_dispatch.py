"""Workers that come, go and fall silent; the queue before them; draining."""

import asyncio
import json
from collections.abc import Callable

import pytest
from msgspec.structs import replace

from disagg.config import LeaseConfig, RoutingConfig
from disagg.errors import InvalidRequest, Overloaded, PromptTooLong, Unauthorized, WorkerError
from disagg.protocol import (
    Accepted,
    Generate,
    Goodbye,
    Hello,
    Release,
    Reserve,
    SnapshotRequest,
    SummaryDelta,
    SummaryDigest,
    SummarySnapshot,
)
from disagg.router import Ledger, RouterService
from disagg.router.hashes import PromptHashes
from support.router import LOAD, Harness

MakeRouter = Callable[..., Harness]

# --- workers -----------------------------------------------------------------------------------


def test_a_worker_takes_work_once_it_has_said_who_and_how_it_is(router: Harness) -> None:
    decode = router.add_absent("decode")
    decode.link.up()
    hello = decode.take(Hello)
    assert (hello.router_id, hello.lease_ttl_s) == ("router.1", 30.0)
    assert not router.service.healthy()
    decode.say(decode.welcome)
    assert not router.service.healthy()
    assert [w["state"] for w in router.service.workers()] == ["starting"]
    decode.say(decode.load)
    assert router.service.healthy()
    assert [w["state"] for w in router.service.workers()] == ["ready"]


def test_a_worker_that_is_loading_is_shown_and_not_used(router: Harness) -> None:
    decode = router.add_absent("decode")
    decode.load = replace(LOAD, state="starting")
    decode.join()
    assert [w["state"] for w in router.service.workers()] == ["starting"]
    with pytest.raises(WorkerError):
        router.submit()


def test_workers_are_shown_with_their_pages(router: Harness) -> None:
    decode = router.add("decode")
    router.add_absent("prefill")
    decode.tell_load(pages_free=900, pages_cached=60, pages_in_use=40, running=2, waiting=1, leases=3)
    (shown,) = router.service.workers()
    assert shown == {
        "id": "decode-0",
        "role": "decode",
        "state": "ready",
        "pid": 1,
        "rank_pids": [1],
        "metrics_url": "http://127.0.0.1:1/metrics",
        "tensor_parallel_size": 1,
        "running": 2,
        "waiting": 1,
        "leases": 3,
        "pages": {"total": 1000, "free": 900, "cached": 60, "in_use": 40},
        "uuid": "decode-0.0",
        "address": "decode-0",
        "refused": None,
        "incompatible": {},
    }


def test_a_silent_worker_is_lost(router: Harness) -> None:
    decode = router.add("decode")
    router.advance(1.9, heard=False)
    assert router.service.healthy()
    router.advance(0.2, heard=False)
    assert decode.link.resets == ["silent for 2.1 s"]
    assert not router.service.healthy()
    assert router.service.workers()[0]["state"] == "lost"


def test_what_a_busy_router_has_not_read_yet_is_no_silence(router: Harness) -> None:
    decode = router.add("decode")
    decode.link.inbox.append(decode.load)
    router.advance(60.0, heard=False)
    assert decode.link.resets == []


def test_a_worker_that_says_goodbye_is_let_go_at_once(router: Harness) -> None:
    decode = router.add("decode")
    decode.say(Goodbye("drained"))
    assert decode.link.resets == ["goodbye: drained"]
    assert not router.service.healthy()


def test_a_draining_worker_keeps_what_it_has_and_gets_nothing_new(router: Harness) -> None:
    decode = router.add("decode")
    client = router.submit(max_tokens=2)
    message = decode.take(Generate)
    decode.tell_load(state="draining")
    router.submit()
    decode.tokens(message, 0, 10, 11, finish="length")
    assert client.tokens == [10, 11]
    assert [type(message) for message in decode.sent()] == [Release]


def test_leases_are_renewed_every_third_of_their_life(router: Harness) -> None:
    decode = router.add("decode")
    for _ in range(60):
        router.advance(1.0)
    assert decode.link.num_renews == 6


def test_a_new_process_at_an_address_is_another_worker(router: Harness) -> None:
    decode = router.add("decode")
    decode.say(SummaryDelta(1, 1, (7).to_bytes(8, "little"), b""))
    index = router.dispatcher.registry.index
    assert index.digest(0)[0] == 1
    decode.die()
    decode.restart()
    assert index.digest(0)[0] == 0, "its cache is empty"
    assert [w["uuid"] for w in router.service.workers()] == ["decode-0.1"]


def test_a_worker_that_does_not_say_who_it_is_is_asked_again(router: Harness) -> None:
    decode = router.add_absent("decode")
    decode.link.up()
    decode.take(Hello)
    router.advance(4.0, heard=False)
    assert decode.sent() == []
    router.advance(2.0, heard=False)
    decode.take(Hello)
    decode.say(decode.welcome, decode.load, decode.welcome)
    assert router.service.healthy()
    router.advance(6.0)
    assert decode.sent() == []


def test_each_connection_has_its_own_leases(router: Harness) -> None:
    """Else an Abort that was lost with a link would leave a lease that is renewed for ever."""
    decode = router.add("decode")
    decode.die()
    decode.link.up()
    assert decode.take(Hello).router_id == "router.2"


def test_a_summary_with_a_gap_is_asked_for_whole(router: Harness) -> None:
    decode = router.add("decode")
    decode.say(SummaryDelta(1, 2, b"", b""))
    decode.take(SnapshotRequest)
    decode.say(SummarySnapshot(1, 2, (7).to_bytes(8, "little"), True), SummaryDigest(1, 2, 1, 7))
    assert decode.sent() == []
    decode.say(SummaryDigest(1, 2, 1, 8))
    decode.take(SnapshotRequest)


def test_a_worker_whose_summary_lies_is_asked_for_it_again(router: Harness) -> None:
    """And its promises do not count for a while: else it would draw every prompt of that prefix."""
    decode = router.add("decode", max_num_seqs=100)
    prompt = list(range(1, 2001))
    hashes = PromptHashes(prompt, "").of(16, "")
    decode.say(SummaryDelta(1, 1, hashes.tobytes(), b""))
    client = router.submit(prompt, max_tokens=1)
    assert client.record()["predicted"]["decode_cached_tokens"] == 1984
    message = decode.take(Generate)
    decode.say(Accepted(message.transfer_id, 0, 0))
    decode.take(SnapshotRequest)
    assert router.sample("disagg_prefix_predicted_tokens_total") == 1984
    assert router.sample("disagg_prefix_actual_tokens_total") == 0
    decode.tokens(message, 0, 10, finish="length")
    assert router.submit(prompt, max_tokens=1).record()["predicted"]["decode_cached_tokens"] == 0


def test_the_worker_with_the_longest_prefix_is_picked(router: Harness) -> None:
    first, second = router.add("decode"), router.add("decode")
    prompt = list(range(1, 101))
    hashes = PromptHashes(prompt, "").of(16, "")
    second.say(SummaryDelta(1, 1, hashes.tobytes(), b""))
    router.submit(prompt)
    second.take(Generate)
    router.submit(prompt, cache_salt="another tenant")
    first.take(Generate)


# --- the queue ---------------------------------------------------------------------------------


def test_a_prompt_waits_in_the_router_until_its_prefill_worker_can_begin(router: Harness) -> None:
    """Waiting prompts hold no pages anywhere."""
    prefill, decode = router.add("prefill"), router.add("decode")
    prefill.tell_load(queued_tokens=2000, prefill_tokens_per_s=1000.0)
    prefill.load = replace(LOAD, queued_tokens=2000, prefill_tokens_per_s=1000.0)
    client = router.submit()
    assert decode.sent() == []
    assert client.record()["decision"] is None
    router.clock.advance(0.98)  # 1,020 tokens are left, one chunk is 1,024
    router.dispatcher.on_tick()
    decode.take(Reserve)


def test_the_queue_is_first_come_first_served(router: Harness) -> None:
    decode = router.add("decode", max_num_seqs=1)
    router.submit(max_tokens=1)
    others = [router.submit(max_tokens=1) for _ in range(3)]
    for number in range(1, 4):
        decode.tokens(decode.take(Generate), 0, 1, finish="length")
        decode.take(Release)
        following = decode.take(Generate)
        assert following.transfer_id == f"r{number + 1}-0"
        decode.link.sent.append(following)
    decode.tokens(decode.take(Generate), 0, 1, finish="length")
    assert [client.finish_reason for client in others] == ["length"] * 3


def test_a_full_queue_turns_away_with_the_time_to_come_back(make_router: MakeRouter) -> None:
    router = make_router(routing=RoutingConfig(max_queued_tokens=100))
    decode = router.add("decode", max_num_seqs=1)
    decode.tell_load(prefill_tokens_per_s=10.0)
    router.submit(60)  # runs
    router.submit(200)  # whoever finds nobody waiting may wait, however long
    with pytest.raises(Overloaded) as refused:
        router.submit(60)
    assert refused.value.retry_after_s == pytest.approx(16.0)
    record = router.service.records(1)[0]
    assert (record["error"], record["finish_reason"], record["release"]) == (
        "Overloaded",
        "error",
        "not_placed",
    )
    assert router.sample("disagg_rejected_requests_total", error="Overloaded") == 1


def test_what_has_begun_goes_before_what_has_not(router: Harness) -> None:
    decode = router.add("decode", max_num_seqs=1)
    first = router.submit(max_tokens=5)
    router.submit()
    message = decode.take(Generate)
    decode.tokens(message, 0, 10, finish="handed_back")
    decode.tell_load()
    assert decode.take(Generate).transfer_id == message.transfer_id
    assert first.tokens == [10]


def test_without_a_decode_worker_requests_wait_and_only_for_a_while(router: Harness) -> None:
    """New ones as long as running ones, from the moment when the pool was empty; then all are refused."""
    decode = router.add("decode")
    running = router.submit(max_tokens=3)
    decode.tokens(decode.take(Generate), 0, 10)
    router.advance(0.1)
    decode.die()
    router.advance(29.0)
    new = router.submit()
    for client in (running, new):
        client.read()
        assert client.error is None
    router.advance(1.1)
    for client in (running, new):
        client.read()
        assert isinstance(client.error, WorkerError)
    with pytest.raises(WorkerError):
        router.submit()


def test_a_prompt_that_fits_no_context_is_refused(router: Harness) -> None:
    router.add("decode", max_model_len=100)
    router.add("decode", max_model_len=50)
    assert router.service.max_model_len("fake") == 50
    with pytest.raises(PromptTooLong):
        router.submit(50)


def test_unknown_workers_have_no_length(router: Harness) -> None:
    with pytest.raises(WorkerError):
        router.service.max_model_len("fake")


# --- draining ----------------------------------------------------------------------------------


def test_draining_refuses_what_is_new_and_waits_for_what_runs(router: Harness) -> None:
    decode = router.add("decode")
    client = router.submit(max_tokens=1)
    message = decode.take(Generate)

    async def drain() -> bool:
        draining = asyncio.ensure_future(router.service.drain(60.0))
        await asyncio.sleep(0)
        assert not router.service.healthy()
        with pytest.raises(WorkerError):
            await router.service.submit(client.request)
        assert not draining.done()
        decode.tokens(message, 0, 10, finish="length")
        return await draining

    assert router.runner.run(drain())
    assert client.tokens == [10]


def test_draining_ends_what_takes_too_long(router: Harness) -> None:
    decode = router.add("decode")
    client = router.submit()
    decode.take(Generate)
    assert not router.runner.run(router.service.drain(0.0))
    client.read()
    assert isinstance(client.error, WorkerError)
    assert client.record()["finish_reason"] == "abort"
    router.dispatcher.close()
    assert isinstance(decode.sent()[-1], Goodbye)
    assert decode.link.closed


# --- the books ---------------------------------------------------------------------------------


def test_requests_are_counted_by_decision_and_how_they_ended(router: Harness) -> None:
    decode = router.add("decode")
    client = router.submit(max_tokens=2)
    decode.tokens(decode.take(Generate), 0, 10, 11, finish="stop")
    router.submit().leave()
    assert client.finish_reason == "stop"
    assert router.sample("disagg_requests_total", decision="local", finish_reason="stop") == 1
    assert router.sample("disagg_requests_total", decision="local", finish_reason="abort") == 1
    assert router.sample("disagg_completion_tokens_total") == 2
    assert router.sample("disagg_time_to_first_token_seconds_count") == 1
    assert router.sample("disagg_leases", state="local") == 0
    decode.sent()


def test_the_log_says_why_no_worker_serves_a_request(
    router: Harness, caplog: pytest.LogCaptureFixture
) -> None:
    """The client is only told that none can."""
    with caplog.at_level("INFO"), pytest.raises(WorkerError):
        router.submit()
    assert "why='no decode worker is ready'" in caplog.text


def test_a_request_that_was_never_submitted_is_in_the_ledger(router: Harness) -> None:
    router.service.note_rejected("x1", "mine", PromptTooLong("too long"))
    record = router.runner.run(router.service.record("x1"))
    assert record is not None
    assert (record["client_request_id"], record["error"], record["decision"]) == (
        "mine",
        "PromptTooLong",
        None,
    )
    assert router.runner.run(router.service.record("x2")) is None


def test_a_request_without_a_key_is_counted_but_pushes_no_record_out(router: Harness) -> None:
    router.service.note_rejected("x1", None, Unauthorized("a key is needed"))
    assert router.service.records(10) == []
    assert router.sample("disagg_rejected_requests_total", error="Unauthorized") == 1


def test_other_times_of_leases_are_told(make_router: MakeRouter) -> None:
    decode = make_router(lease=LeaseConfig(lease_ttl_s=9.0)).add_absent("decode")
    decode.link.up()
    assert decode.take(Hello).lease_ttl_s == 9.0


def test_a_record_of_another_router_is_asked_for(router: Harness) -> None:
    """Behind one Service a client's second request may reach another router than its first."""
    asked: list[str] = []

    async def ask(request_id: str) -> bytes | None:
        asked.append(request_id)
        return b'{"request_id":"theirs"}' if request_id == "theirs" else None

    service = RouterService(router.dispatcher, Ledger(10), ask_peers=ask)
    service.note_rejected("ours", None, InvalidRequest("no", param="n"))

    def record(request_id: str) -> object:
        return router.runner.run(service.record(request_id))

    assert record("theirs") == {"request_id": "theirs"}
    assert record("nobody's") is None
    ours = record("ours")
    assert asked == ["theirs", "nobody's"], "its own it knows"
    assert json.loads(service.own_record("ours") or b"") == ours
    assert service.own_record("theirs") is None, "who is asked asks nobody else"
