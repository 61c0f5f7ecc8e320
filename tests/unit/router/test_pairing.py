"""Workers of several versions behind one router: who is used, who is paired, who may go on with what."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from msgspec.structs import replace

from disagg.errors import WorkerError
from disagg.protocol import Generate, Hello, KvLayout, Prefill, Reserve, SummaryDelta
from disagg.router.hashes import PromptHashes
from disagg.router.pairing import kv_terms, page_salt, why_incompatible, why_refused
from support.router import PAGE_SIZE, WELCOME, Actor, Client, Harness

MakeRouter = Callable[..., Harness]
LAYOUT = WELCOME.layout

# --- what is compared ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("theirs", "ours", "why"),
    [
        ("", None, None),
        ("aa", None, None),
        ("", "aa", None),
        ("aa", "aa", None),
        ("bb", "aa", "its tokenizer is bb, this router's aa"),
    ],
)
def test_a_worker_with_another_tokenizer_is_refused(theirs: str, ours: str | None, why: str | None) -> None:
    """Its token ids would be read as other text; who does not tell is trusted, as before there was a hash."""
    assert why_refused(replace(WELCOME, tokenizer_hash=theirs), ours) == why


def test_a_worker_of_another_protocol_is_refused() -> None:
    assert (
        why_refused(replace(WELCOME, protocol_version=99), None)
        == "it speaks protocol version 99, this router 1"
    )


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({}, None),
        ({"layout": KvLayout(PAGE_SIZE, 4, 2, 8, "bfloat16", 2)}, None),
        ({"uuid": "x", "num_pages": 1, "max_num_seqs": 1, "tokenizer_hash": "x"}, None),
        ({"model_hash": "aa"}, "its model is aa, here unknown"),
        ({"dtype": "float32"}, "its dtype is float32, here bfloat16"),
        ({"transport": "nixl"}, "its transport is nixl, here fake"),
        ({"layout": KvLayout(32, 4, 2, 8, "bfloat16", 1)}, "its page size is 32, here 16"),
        ({"layout": KvLayout(PAGE_SIZE, 2, 2, 8, "bfloat16", 1)}, "its number of KV heads is 2, here 4"),
        ({"layout": KvLayout(PAGE_SIZE, 4, 1, 8, "bfloat16", 1)}, "its number of layers is 1, here 2"),
        ({"layout": KvLayout(PAGE_SIZE, 4, 2, 4, "bfloat16", 1)}, "its head size is 4, here 8"),
        (
            {"layout": KvLayout(PAGE_SIZE, 4, 2, 8, "float8_e4m3fn", 1)},
            "its KV dtype is float8_e4m3fn, here bfloat16",
        ),
    ],
)
def test_a_pair_agrees_on_what_kv_is(changes: dict[str, Any], why: str | None) -> None:
    """Tensor-parallel sizes may differ: resharding is what the layout is for."""
    assert why_incompatible(kv_terms(WELCOME), kv_terms(replace(WELCOME, **changes))) == why


def test_page_hashes_are_salted_by_model_and_by_cache_salt() -> None:
    salts = {page_salt(model, salt) for model in ("", "aa", "bb") for salt in ("", "x", "y")}
    assert len(salts) == 9
    assert page_salt("", "x") == "x"


def test_hashes_are_of_the_page_size_and_model_that_are_asked_for() -> None:
    prompt = PromptHashes(list(range(64)), "")
    assert len(prompt.of(16, "")) == 4
    assert len(prompt.of(32, "")) == 2
    assert not set(prompt.of(16, "aa").tolist()) & set(prompt.of(16, "bb").tolist())
    assert prompt.of(16, "aa") is prompt.of(16, "aa"), "the head of the queue is looked up again and again"


# --- the router ----------------------------------------------------------------------------------


def test_a_worker_of_another_protocol_is_shown_and_not_used(router: Harness) -> None:
    """It used to be dropped without a trace; during an upgrade somebody looks for it."""
    decode = router.add_absent("decode", protocol_version=99)
    decode.join()
    (shown,) = router.service.workers()
    assert (shown["id"], shown["state"]) == ("decode-0", "starting")
    assert shown["refused"] == "it speaks protocol version 99, this router 1"
    assert not router.service.healthy()


def test_a_worker_of_another_protocol_is_used_once_another_process_is_there(router: Harness) -> None:
    decode = router.add_absent("decode", protocol_version=99)
    decode.join()
    decode.die()
    assert router.service.workers()[0]["state"] == "lost"
    decode.welcome = replace(decode.welcome, protocol_version=1)
    decode.restart()
    assert router.service.workers()[0]["refused"] is None
    assert router.service.healthy()


def test_one_that_is_refused_is_asked_again_and_said_once(
    router: Harness, caplog: pytest.LogCaptureFixture
) -> None:
    decode = router.add_absent("decode", protocol_version=99)
    decode.join()
    for _ in range(3):
        router.advance(6.0, heard=False)
        decode.take(Hello)
        decode.say(decode.welcome)
    assert caplog.text.count("worker is not used") == 1


def test_a_worker_with_another_tokenizer_is_shown_and_not_used(make_router: MakeRouter) -> None:
    router = make_router(tokenizer_hash="aa")
    router.add("decode", tokenizer_hash="bb", max_model_len=10)
    assert not router.service.healthy()
    assert router.service.workers()[0]["refused"] == "its tokenizer is bb, this router's aa"
    good = router.add("decode", tokenizer_hash="aa")
    router.submit(100)
    good.take(Generate)


def test_pairs_that_cannot_be_are_shown_with_the_reason(router: Harness) -> None:
    router.add("prefill", "prefill-a", model_hash="aa")
    router.add("decode", "decode-a", model_hash="aa")
    router.add("decode", "decode-b", model_hash="bb")
    router.add("unified", "unified-c", model_hash="cc")
    lost = router.add("decode", "decode-c", model_hash="cc")
    lost.die()
    shown = {worker["id"]: worker["incompatible"] for worker in router.service.workers()}
    assert shown == {
        "prefill-a": {"decode-b": "its model is bb, here aa"},
        "decode-a": {},
        "decode-b": {"prefill-a": "its model is aa, here bb"},
        "decode-c": {},
        "unified-c": {},
    }


def add_versions(router: Harness) -> dict[str, Actor]:
    """Two versions of a model, a pair of each."""
    return {
        f"{role[0]}{version}": router.add(role, f"{role}-{version}", model_hash=version)  # type: ignore[arg-type]
        for version in "ab"
        for role in ("prefill", "decode")
    }


def test_a_request_is_prefilled_and_decoded_within_one_version(router: Harness) -> None:
    actors = add_versions(router)
    for _ in range(8):
        router.submit()
        (decode,) = [actors[name] for name in ("da", "db") if actors[name].link.sent]
        message = decode.reserve()
        (prefill,) = [actors[name] for name in ("pa", "pb") if actors[name].link.sent]
        assert prefill.welcome.model_hash == decode.welcome.model_hash
        sent = prefill.take(Prefill)
        assert message.cache_salt == sent.cache_salt == f"{decode.welcome.model_hash}/"


def test_with_no_pair_of_one_version_it_runs_where_it_decodes(router: Harness) -> None:
    """A pool that rolls first has nobody to prefill for; that it was not disaggregated is counted."""
    router.add("prefill", model_hash="aa")
    decode = router.add("decode", model_hash="bb")
    client = router.submit(max_tokens=1)
    message = decode.take(Generate)
    decode.tokens(message, 0, 10, finish="length")
    assert client.record()["reason"] == "no pair can exchange KV"
    assert router.sample("disagg_silent_local_total") == 1


def start_on_a(router: Harness) -> tuple[dict[str, Actor], Client]:
    """A stream whose first tokens version a has made; b was not there yet."""
    actors = {"da": router.add("decode", "decode-a", model_hash="a")}
    client = router.submit(max_tokens=4)
    actors["da"].tokens(actors["da"].take(Generate), 0, 10, 11)
    assert client.tokens == [10, 11]
    return actors, client


def test_what_one_model_began_another_never_continues(router: Harness) -> None:
    actors, client = start_on_a(router)
    other = router.add("decode", "b", model_hash="b")  # ties go to the lower id: to this one
    same = router.add("decode", "decode-a2", model_hash="a")
    actors["da"].die()
    assert not other.sent()
    message = same.take(Generate)
    assert (message.num_prompt_tokens, message.token_ids[-2:]) == (40, [10, 11])
    same.tokens(message, 2, 12, 13, finish="length")
    assert client.tokens == [10, 11, 12, 13]


def test_with_none_of_its_model_left_it_fails_and_says_so(router: Harness) -> None:
    actors, client = start_on_a(router)
    other = router.add("decode", "decode-b", model_hash="b")
    actors["da"].die()
    for _ in range(29):
        router.advance(1.0)
    client.read()
    assert client.error is None, "it may come back"
    router.advance(2.0)
    client.read()
    assert isinstance(client.error, WorkerError)
    record = client.record()
    assert (record["finish_reason"], record["release"]) == ("error", "worker_lost")
    assert record["failures"][-1] == "no worker of the model that began it came back"
    assert not other.sent()


def test_it_waits_aside_for_a_worker_of_its_model(router: Harness) -> None:
    """Who waits for a restart must not keep others from beginning."""
    actors, client = start_on_a(router)
    other = router.add("decode", "decode-b", model_hash="b")
    actors["da"].die()
    router.submit()
    other.take(Generate)
    actors["da"].restart()
    router.advance(0.1)
    message = actors["da"].take(Generate)
    router.advance(1.0)
    assert not actors["da"].sent(), "it is placed once"
    actors["da"].tokens(message, 2, 12, 13, finish="length")
    assert client.tokens == [10, 11, 12, 13]


def test_one_that_waits_aside_can_be_left(router: Harness) -> None:
    actors, client = start_on_a(router)
    router.add("decode", "decode-b", model_hash="b")
    actors["da"].die()
    client.leave()
    actors["da"].restart()
    router.advance(1.0)
    assert not actors["da"].sent()
    assert client.record()["finish_reason"] == "abort"


def test_what_no_model_has_begun_goes_anywhere(router: Harness) -> None:
    """No token has been seen: a retry may begin with another model."""
    decode = router.add("decode", "decode-a", model_hash="a")
    router.submit()
    decode.take(Generate)
    other = router.add("decode", "decode-b", model_hash="b")
    decode.die()
    assert other.take(Generate).cache_salt == "b/"


def test_a_prefix_is_found_only_on_workers_of_its_model_and_page_size(router: Harness) -> None:
    first = router.add("decode", "decode-a", model_hash="a")
    second = router.add("decode", "decode-b", model_hash="b", layout=replace(LAYOUT, page_size=32))
    prompt = list(range(1, 101))
    hashes = PromptHashes(prompt, "")
    # What each holds is told in its own hashes; a's are nothing to b, and the other way round.
    stray = np.concatenate([hashes.of(16, "b"), hashes.of(32, "a"), hashes.of(16, "")])
    first.say(SummaryDelta(1, 1, stray.tobytes(), b""))
    second.say(SummaryDelta(1, 1, hashes.of(32, "b").tobytes(), b""))
    facts = router.dispatcher.registry.facts(hashes, 0.0)
    assert {f.uuid: f.matched_tokens for f in facts} == {"decode-a.0": 0, "decode-b.0": 96}
    first.say(SummaryDelta(1, 2, hashes.of(16, "a").tobytes(), b""))
    facts = router.dispatcher.registry.facts(hashes, 0.0)
    assert {f.uuid: f.matched_tokens for f in facts} == {"decode-a.0": 96, "decode-b.0": 96}


def test_a_reservation_carries_the_salt_of_its_model(router: Harness) -> None:
    router.add("prefill", model_hash="a")
    decode = router.add("decode", model_hash="a")
    router.submit(cache_salt="tenant")
    assert decode.take(Reserve).cache_salt == "a/tenant"
