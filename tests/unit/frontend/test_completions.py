"""The two endpoints over a generator that speaks when told to."""

import asyncio
from collections.abc import Callable
from typing import Any

import httpx
import pytest

from disagg.errors import Overloaded, WorkerLost
from disagg.frontend import App, TextModel
from support.asgi import Call, events_of
from support.generator import FakeGenerator

pytestmark = pytest.mark.anyio
Ids = Callable[[str], list[int]]
Body = Callable[..., dict[str, Any]]


def choice(event: dict[str, Any]) -> dict[str, Any]:
    (choice,) = event["choices"]
    return choice


async def test_chat_streams_each_delta_as_it_comes(
    app: App, generator: FakeGenerator, ids: Ids, chat: Body
) -> None:
    async with Call(app, "/v1/chat/completions", chat(stream=True)) as call:
        ticket = await generator.ticket()
        ticket.push(*ids("the fox"))
        role, first = await call.next_events()
        assert choice(role)["delta"] == {"role": "assistant", "content": "", "refusal": None}
        assert choice(first)["delta"] == {"content": "the fox"}
        assert choice(first)["finish_reason"] is None
        ticket.push(*ids(" jumps"))
        (second,) = await call.next_events()
        assert choice(second)["delta"] == {"content": " jumps"}
        ticket.push(2, finish="stop")
        end, done = await call.next_events()
        assert choice(end)["delta"] == {}
        assert choice(end)["finish_reason"] == "stop"
        assert done == "[DONE]"
    assert call.status == 200
    assert call.headers["content-type"].startswith("text/event-stream")
    assert {event["id"] for event in (role, first, second, end)} == {
        f"chatcmpl-{call.headers['x-request-id']}"
    }
    assert {event["object"] for event in (role, first, second, end)} == {"chat.completion.chunk"}
    assert not ticket.aborted


async def test_deltas_that_wait_are_joined(
    app: App, generator: FakeGenerator, ids: Ids, completion: Body
) -> None:
    """One event for what is there, not one a token: this is what keeps the router's CPU low under load."""
    async with Call(app, "/v1/completions", completion(stream=True)) as call:
        ticket = await generator.ticket()
        for token_id in ids("the lazy dog"):
            ticket.push(token_id)
        (event,) = await call.next_events()
        assert choice(event)["text"] == "the lazy dog"
        ticket.push(finish="length")
        await call.next_events()


async def test_nothing_is_sent_for_half_a_character(
    app: App, generator: FakeGenerator, ids: Ids, completion: Body
) -> None:
    token_ids = ids("🦊")
    assert len(token_ids) > 1
    async with Call(app, "/v1/completions", completion(stream=True)) as call:
        ticket = await generator.ticket()
        for token_id in token_ids:
            ticket.push(token_id)
            await asyncio.sleep(0)
        ticket.push(finish="stop")
        events = []
        while "[DONE]" not in events:
            events += await call.next_events()
    assert "".join(choice(event)["text"] for event in events[:-1]) == "🦊"


async def test_a_character_that_never_completes_is_given_out_as_what_it_is(
    http: httpx.AsyncClient, generator: FakeGenerator, ids: Ids, completion: Body
) -> None:
    generator.reply = lambda request, index: [ids("a🦊")[:-1]]
    answer = await http.post("/v1/completions", json=completion())
    assert choice(answer.json())["text"] == "a\ufffd"


async def test_whole_chat_answer(
    http: httpx.AsyncClient, generator: FakeGenerator, ids: Ids, chat: Body
) -> None:
    generator.reply = lambda request, index: [ids("the fox"), [2]]
    answer = await http.post("/v1/chat/completions", json=chat())
    assert answer.status_code == 200
    body = answer.json()
    assert body["object"] == "chat.completion"
    assert body["choices"] == [
        {
            "index": 0,
            "message": {"role": "assistant", "content": "the fox", "refusal": None},
            "logprobs": None,
            "finish_reason": "stop",
        }
    ]
    prompt = ids("<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n")
    assert generator.request.prompts == [prompt]
    assert body["usage"] == {
        "prompt_tokens": len(prompt),
        "completion_tokens": len(ids("the fox")) + 1,
        "total_tokens": len(prompt) + len(ids("the fox")) + 1,
        "prompt_tokens_details": {"cached_tokens": 0},
    }


async def test_choices_of_several_prompts_are_numbered_prompt_first(
    http: httpx.AsyncClient, generator: FakeGenerator, ids: Ids, completion: Body
) -> None:
    generator.reply = lambda request, index: [ids(f"answer {index}")]
    answer = await http.post("/v1/completions", json=completion(["one", "two"], n=2))
    choices = answer.json()["choices"]
    assert [entry["text"] for entry in choices] == [f"answer {index}" for index in range(4)]
    assert [entry["index"] for entry in choices] == [0, 1, 2, 3]
    assert generator.request.prompts == [ids("one"), ids("two")]
    assert generator.request.n == 2


@pytest.mark.parametrize("prompt", [[5, 6, 7], [[5, 6, 7]]])
async def test_prompts_of_token_ids_are_used_as_they_are(
    http: httpx.AsyncClient, generator: FakeGenerator, completion: Body, prompt: list[Any]
) -> None:
    generator.reply = lambda request, index: [[9]]
    answer = await http.post("/v1/completions", json=completion(prompt))
    assert answer.status_code == 200
    assert generator.request.prompts == [[5, 6, 7]]
    assert answer.json()["usage"]["prompt_tokens"] == 3


async def test_cached_tokens_are_those_of_the_worker_that_computed_the_prompt(
    app: App, generator: FakeGenerator, completion: Body
) -> None:
    """Of two choices the second finds the first's pages: the prompt itself was only cached for 16 tokens."""
    async with Call(app, "/v1/completions", completion(n=2)) as call:
        ticket = await generator.ticket()
        ticket.push(9, index=1, cached_tokens=32, finish="stop")
        ticket.push(9, index=0, cached_tokens=16, finish="stop")
        body = await call.next_body()
    assert b'"prompt_tokens_details":{"cached_tokens":16}' in body


async def test_usage_comes_last_and_only_when_asked_for(
    app: App, generator: FakeGenerator, completion: Body
) -> None:
    asked = completion([1, 2, 3], stream=True, stream_options={"include_usage": True})
    async with Call(app, "/v1/completions", asked) as call:
        ticket = await generator.ticket()
        ticket.push(50, cached_tokens=2)
        (event,) = await call.next_events()
        assert event["usage"] is None
        ticket.push(2, finish="stop")
        _, usage, done = await call.next_events()
    assert usage["choices"] == []
    assert usage["usage"] == {
        "prompt_tokens": 3,
        "completion_tokens": 2,
        "total_tokens": 5,
        "prompt_tokens_details": {"cached_tokens": 2},
    }
    assert done == "[DONE]"

    async with Call(app, "/v1/completions", completion([1, 2, 3], stream=True)) as call:
        (await generator.ticket()).push(50, finish="stop")
        events = await call.next_events()
    assert not any("usage" in event for event in events[:-1])


async def test_stop_string_across_deltas_ends_the_sequence_at_the_worker(
    app: App, generator: FakeGenerator, ids: Ids, completion: Body
) -> None:
    async with Call(app, "/v1/completions", completion(stream=True, stop=["fox jumps"])) as call:
        ticket = await generator.ticket()
        ticket.push(*ids("the brown fo"))
        (event,) = await call.next_events()
        assert choice(event)["text"] == "the brown ", "what may become a stop string is held back"
        ticket.push(*ids("x jum"))
        ticket.push(*ids("ps over the"))
        end, done = await call.next_events()
        assert choice(end)["finish_reason"] == "stop"
        assert done == "[DONE]"
    assert ticket.stopped == [(0, 16)]
    assert not ticket.aborted


async def test_text_that_only_began_a_stop_string_is_given_out_at_the_end(
    http: httpx.AsyncClient, generator: FakeGenerator, ids: Ids, completion: Body
) -> None:
    generator.reply = lambda request, index: [ids("the brown fo")]
    answer = await http.post("/v1/completions", json=completion(stop="fox"))
    assert choice(answer.json())["text"] == "the brown fo"
    assert choice(answer.json())["finish_reason"] == "stop"


async def test_one_choice_stops_and_the_other_goes_on(
    app: App, generator: FakeGenerator, ids: Ids, completion: Body
) -> None:
    async with Call(app, "/v1/completions", completion(n=2, stream=True, stop="fox")) as call:
        ticket = await generator.ticket()
        ticket.push(*ids("the fox runs"), index=1)
        text, end = await call.next_events()
        assert choice(text) == {"index": 1, "text": "the ", "logprobs": None, "finish_reason": None}
        assert choice(end)["finish_reason"] == "stop"
        ticket.push(*ids("late"), index=1)  # was already on its way when the stop string was found
        ticket.push(*ids("dog"), index=0, finish="length")
        events = await call.next_events()
    assert [(choice(e)["index"], choice(e)["text"]) for e in events[:-1]] == [(0, "dog"), (0, "")]
    assert ticket.stopped == [(1, 5)]


async def test_client_that_leaves_aborts_a_stream(
    app: App, generator: FakeGenerator, ids: Ids, completion: Body
) -> None:
    async with Call(app, "/v1/completions", completion(stream=True)) as call:
        ticket = await generator.ticket()
        ticket.push(*ids("the"))
        await call.next_events()
        call.disconnect()
    assert ticket.aborted


async def test_client_that_leaves_aborts_before_the_first_token(
    app: App, generator: FakeGenerator, chat: Body
) -> None:
    async with Call(app, "/v1/chat/completions", chat()) as call:
        ticket = await generator.ticket()
        call.disconnect()
    assert ticket.aborted
    assert call.nothing_sent()
    assert generator.rejected == [], "the generator keeps the record of what it was given"


async def test_lost_workers_before_the_first_token_are_a_503(
    app: App, generator: FakeGenerator, completion: Body
) -> None:
    async with Call(app, "/v1/completions", completion(stream=True)) as call:
        (await generator.ticket()).fail(WorkerLost("decode-0 at tcp://10.0.0.7 died"))
        body = await call.next_body()
    assert call.status == 503
    assert call.headers["retry-after"] == "1"
    assert b"10.0.0.7" not in body, "a client never sees the text of an internal error"
    assert call.headers["x-request-id"].encode() in body


async def test_lost_workers_in_a_stream_end_it_with_an_error_and_no_done(
    app: App, generator: FakeGenerator, ids: Ids, completion: Body
) -> None:
    async with Call(app, "/v1/completions", completion(stream=True)) as call:
        ticket = await generator.ticket()
        ticket.push(*ids("the"))
        await call.next_events()
        ticket.fail(WorkerLost("gone"))
        (event,) = events_of(await call.next_body())
    assert event["error"]["type"] == "server_error"
    assert event["error"]["code"] == "service_unavailable"


async def test_a_sequence_that_ends_as_error_is_no_answer(
    app: App, generator: FakeGenerator, completion: Body
) -> None:
    async with Call(app, "/v1/completions", completion()) as call:
        (await generator.ticket()).push(finish="error")
        await call.next_body()
    assert call.status == 503


async def test_full_queue_is_a_429_that_says_when_to_come_back(
    http: httpx.AsyncClient, generator: FakeGenerator, completion: Body
) -> None:
    generator.refusal = Overloaded("the queue is full", retry_after_s=2.4)
    answer = await http.post("/v1/completions", json=completion(stream=True))
    assert answer.status_code == 429
    assert answer.headers["retry-after"] == "3"
    assert answer.json()["error"]["code"] == "rate_limit_exceeded"
    assert generator.rejected == [], "the generator keeps the record of what it was given"


async def test_a_bug_of_ours_is_a_500_without_its_text(
    http: httpx.AsyncClient, generator: FakeGenerator, completion: Body, caplog: pytest.LogCaptureFixture
) -> None:
    generator.refusal = RuntimeError("secret")
    answer = await http.post("/v1/completions", json=completion())
    assert answer.status_code == 500
    assert "secret" not in answer.text
    assert answer.headers["x-request-id"] in answer.json()["error"]["message"]
    assert "secret" in caplog.text


async def test_max_tokens_is_the_rest_of_the_context_for_chat_and_16_for_completions(
    http: httpx.AsyncClient, generator: FakeGenerator, chat: Body, completion: Body
) -> None:
    generator.reply = lambda request, index: [[9]]
    await http.post("/v1/chat/completions", json=chat())
    request = generator.tickets[0].request
    assert request.sampling.max_tokens == generator.context - len(request.prompts[0])
    await http.post("/v1/completions", json=completion())
    assert generator.tickets[1].request.sampling.max_tokens == 16


async def test_sampling_parameters_reach_the_generator(
    http: httpx.AsyncClient, generator: FakeGenerator, chat: Body
) -> None:
    generator.reply = lambda request, index: [[9]]
    fields = {"temperature": 0.5, "top_p": 0.9, "top_k": 7, "min_p": 0.1, "seed": -1}
    await http.post(
        "/v1/chat/completions",
        json=chat(**fields, max_completion_tokens=5, stop_token_ids=[8], ignore_eos=True),
    )
    sampling = generator.request.sampling
    assert (sampling.temperature, sampling.top_p, sampling.top_k, sampling.min_p) == (0.5, 0.9, 7, 0.1)
    assert sampling.seed == 2**64 - 1
    assert sampling.max_tokens == 5
    assert sampling.stop_token_ids == (8,)
    assert sampling.ignore_eos


async def test_a_missing_seed_is_minted_anew(
    http: httpx.AsyncClient, generator: FakeGenerator, completion: Body
) -> None:
    generator.reply = lambda request, index: [[9]]
    for _ in range(2):
        await http.post("/v1/completions", json=completion())
    first, second = (ticket.request.sampling.seed for ticket in generator.tickets)
    assert first != second


async def test_headers_and_salt_reach_the_generator(
    http: httpx.AsyncClient, generator: FakeGenerator, completion: Body
) -> None:
    generator.reply = lambda request, index: [[9]]
    answer = await http.post(
        "/v1/completions",
        json=completion(cache_salt="tenant"),
        headers={"x-request-id": "mine", "x-disagg-decision": "never"},
    )
    request = generator.request
    assert request.client_request_id == "mine"
    assert answer.headers["x-request-id"] == request.request_id != "mine"
    assert request.decision_override == "never"
    assert request.cache_salt == "tenant"


async def test_a_clients_own_id_is_kept_within_bounds(
    http: httpx.AsyncClient, generator: FakeGenerator, completion: Body
) -> None:
    generator.reply = lambda request, index: [[9]]
    await http.post("/v1/completions", json=completion(), headers={"x-request-id": "x" * 5000})
    assert generator.request.client_request_id == "x" * 256


async def test_long_prompts_are_tokenized_off_the_loop_alike(
    http: httpx.AsyncClient, generator: FakeGenerator, text: TextModel, completion: Body
) -> None:
    generator.reply = lambda request, index: [[9]]
    generator.context = 100_000
    prompt = "the quick brown fox " * 1000
    answer = await http.post("/v1/completions", json=completion(prompt))
    assert answer.status_code == 200
    assert generator.request.prompts == [text.tokenizer.encode(prompt, False)]
