"""Whatever is wrong in a request, it gets a 4xx in OpenAI's shape that names the field.

No worker hears of it.
"""

import json
from typing import Any

import httpx
import pytest

from disagg.errors import DisaggError
from support.generator import FakeGenerator

pytestmark = pytest.mark.anyio
CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"
USER = {"role": "user", "content": "hi"}


def completion(**fields: Any) -> dict[str, Any]:
    return {"model": "test-model", "prompt": "hi", **fields}


def chat(**fields: Any) -> dict[str, Any]:
    return {"model": "test-model", "messages": [USER], **fields}


def raw(fields: bytes) -> bytes:
    return b'{"model":"test-model","prompt":"hi",' + fields + b"}"


async def refused(
    http: httpx.AsyncClient, generator: FakeGenerator, path: str, body: Any, status: int, param: str | None
) -> dict[str, Any]:
    content = body if isinstance(body, bytes) else json.dumps(body).encode()
    answer = await http.post(path, content=content)
    assert answer.status_code == status, answer.text
    error = answer.json()["error"]
    assert error["param"] == param, error
    assert set(error) == {"message", "type", "param", "code"}
    assert error["type"] == "invalid_request_error"
    if param is not None:
        assert param.rpartition(".")[2] in error["message"]
    assert len(error["message"]) < 1000
    assert generator.tickets == []
    ((request_id, _, noted),) = generator.rejected
    assert request_id == answer.headers["x-request-id"]
    assert isinstance(noted, DisaggError)
    return error


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"max_tokens": 0}, "max_tokens"),
        ({"max_tokens": -3}, "max_tokens"),
        ({"max_tokens": 1.5}, "max_tokens"),
        ({"max_tokens": True}, "max_tokens"),
        ({"max_tokens": "5"}, "max_tokens"),
        ({"max_tokens": 10**30}, "max_tokens"),
        ({"n": 0}, "n"),
        ({"n": 129}, "n"),
        ({"n": 1e400}, "n"),
        ({"temperature": -0.1}, "temperature"),
        ({"temperature": 2.1}, "temperature"),
        ({"temperature": float("nan")}, "temperature"),
        ({"temperature": float("-inf")}, "temperature"),
        ({"top_p": 0}, "top_p"),
        ({"top_p": 1.01}, "top_p"),
        ({"top_k": -2}, "top_k"),
        ({"top_k": 2**40}, "top_k"),
        ({"min_p": 1.5}, "min_p"),
        ({"seed": 2**64}, "seed"),
        ({"seed": "x"}, "seed"),
        ({"stop": ["a"] * 5}, "stop"),
        ({"stop": ""}, "stop"),
        ({"stop": ["a", ""]}, "stop"),
        ({"stop": [1]}, "stop[0]"),
        ({"stop": "x" * 2000}, "stop"),
        ({"stop_token_ids": [-1]}, "stop_token_ids"),
        ({"stop_token_ids": list(range(300))}, "stop_token_ids"),
        ({"stream": "yes"}, "stream"),
        ({"stream_options": {"include_usage": True}}, "stream_options"),
        ({"stream": True, "stream_options": {"usage": True}}, "stream_options.usage"),
        ({"stream": True, "stream_options": []}, "stream_options"),
        ({"cache_salt": "a\0"}, "cache_salt"),
        ({"metadata": {"a": 1}}, "metadata"),
        ({"user": "\ud800"}, "user"),
        ({"model": 5}, "model"),
        ({"prompt": ""}, "prompt"),
        ({"prompt": []}, "prompt"),
        ({"prompt": [[]]}, "prompt"),
        ({"prompt": ["a", ""]}, "prompt"),
        ({"prompt": ["a", 1]}, "prompt"),
        ({"prompt": [1, [2]]}, "prompt"),
        ({"prompt": [[1], ["a"]]}, "prompt[1][0]"),
        ({"prompt": [1, None]}, "prompt[1]"),
        ({"prompt": None}, "prompt"),
        ({"prompt": {"text": "a"}}, "prompt"),
        ({"prompt": [5, -1]}, "prompt"),
        ({"prompt": [5, 320]}, "prompt"),
        ({"prompt": [10**30]}, "prompt"),
        ({"prompt": ["a"] * 129}, "prompt"),
        ({"prompt": ["a"] * 65, "n": 2}, "prompt"),
        ({"prompt": "a\0b"}, "prompt"),
        ({"prompt": "\udc80"}, "prompt"),
        ({"prompt": "the " * 3000}, "prompt"),
        ({"prompt": [5] * 512}, "prompt"),
        ({"prompt": [5] * 500, "max_tokens": 13}, "max_tokens"),
        ({"prompt": [5] * 500}, "max_tokens"),  # 16 by default, and never clamped
        ({"max_tokens": 512}, "max_tokens"),
        ({"temprature": 1}, "temprature"),
        ({"messages": []}, "messages"),
    ],
)
async def test_completions(
    http: httpx.AsyncClient, generator: FakeGenerator, fields: dict[str, Any], param: str
) -> None:
    await refused(http, generator, COMPLETIONS, completion(**fields), 400, param)


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"messages": []}, "messages"),
        ({"messages": "hi"}, "messages"),
        ({"messages": [USER] * 2049}, "messages"),
        ({"messages": [{"role": "user"}]}, "messages[0].content"),
        ({"messages": [{"role": "user", "content": None}]}, "messages[0].content"),
        ({"messages": [{"role": "user", "content": 5}]}, "messages[0].content"),
        ({"messages": [{"role": "user", "content": []}]}, "messages[0].content"),
        ({"messages": [{"content": "hi"}]}, "messages[0].role"),
        ({"messages": [USER, {"role": "robot", "content": "hi"}]}, "messages[1].role"),
        ({"messages": [{"role": "tool", "content": "hi"}]}, "messages[0].role"),
        ({"messages": [{"role": "user", "content": "hi", "mood": "x"}]}, "messages[0].mood"),
        ({"messages": [{"role": "user", "content": [{"type": "text"}]}]}, "messages[0].content[0].text"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "messages[0].content[0].type"),
        ({"messages": [{"role": "user", "content": "\udfff"}]}, "messages[0].content"),
        ({"messages": [{"role": "user", "content": "hi", "name": 5}]}, "messages[0].name"),
        ({"messages": [USER | {"tool_calls": [{"id": "x"}]}]}, "messages[0].tool_calls"),
        ({"max_completion_tokens": 0}, "max_completion_tokens"),
        ({"max_completion_tokens": 512}, "max_completion_tokens"),
        ({"max_completion_tokens": 5, "max_tokens": 5}, "max_completion_tokens"),
        ({"messages": [{"role": "user", "content": "the " * 500}]}, "messages"),
        ({"prompt": "hi"}, "prompt"),
        ({"chat_template_kwargs": 5}, "chat_template_kwargs"),
    ],
)
async def test_chat(
    http: httpx.AsyncClient, generator: FakeGenerator, fields: dict[str, Any], param: str
) -> None:
    await refused(http, generator, CHAT, chat(**fields), 400, param)


@pytest.mark.parametrize(
    ("path", "fields"),
    [
        (COMPLETIONS, {"logprobs": 1}),
        (COMPLETIONS, {"echo": True}),
        (COMPLETIONS, {"suffix": "x"}),
        (COMPLETIONS, {"best_of": 3}),
        (COMPLETIONS, {"presence_penalty": 0.5}),
        (COMPLETIONS, {"frequency_penalty": 0.5}),
        (COMPLETIONS, {"repetition_penalty": 1.1}),
        (COMPLETIONS, {"logit_bias": {"5": 1}}),
        (COMPLETIONS, {"min_tokens": 3}),
        (CHAT, {"tools": [{"type": "function"}]}),
        (CHAT, {"tool_choice": "required"}),
        (CHAT, {"response_format": {"type": "json_object"}}),
        (CHAT, {"logprobs": True}),
        (CHAT, {"top_logprobs": 2}),
        (CHAT, {"modalities": ["text", "audio"]}),
        (CHAT, {"store": True}),
        (CHAT, {"reasoning_effort": "low"}),
        (CHAT, {"web_search_options": {}}),
    ],
)
async def test_what_is_not_supported_is_refused_by_name(
    http: httpx.AsyncClient, generator: FakeGenerator, path: str, fields: dict[str, Any]
) -> None:
    body = chat(**fields) if path == CHAT else completion(**fields)
    error = await refused(http, generator, path, body, 400, next(iter(fields)))
    assert error["code"] == "unsupported_parameter"


@pytest.mark.parametrize(
    ("path", "fields"),
    [
        (COMPLETIONS, {"logprobs": None, "echo": False, "suffix": None, "best_of": 1, "logit_bias": {}}),
        (COMPLETIONS, {"presence_penalty": 0.0, "frequency_penalty": 0, "repetition_penalty": 1.0}),
        (COMPLETIONS, {"n": 2, "best_of": 2, "user": "me", "top_k": -1, "temperature": None}),
        (CHAT, {"tools": [], "tool_choice": "none", "response_format": {"type": "text"}, "logprobs": False}),
        (CHAT, {"metadata": {"a": "b"}, "store": False, "parallel_tool_calls": True, "modalities": ["text"]}),
        (CHAT, {"messages": [{"role": "developer", "content": [{"type": "text", "text": "hi"}]}, USER]}),
        (CHAT, {"messages": [USER, {"role": "assistant", "content": "a", "tool_calls": []}, USER]}),
    ],
)
async def test_values_that_ask_for_nothing_are_taken(
    http: httpx.AsyncClient, generator: FakeGenerator, path: str, fields: dict[str, Any]
) -> None:
    """Clients send the defaults of fields they do not use."""
    generator.reply = lambda request, index: [[9]]
    body = chat(**fields) if path == CHAT else completion(**fields)
    answer = await http.post(path, json=body)
    assert answer.status_code == 200, answer.text


@pytest.mark.parametrize("path", [CHAT, COMPLETIONS])
@pytest.mark.parametrize(
    "body",
    [b"", b"{", b"[]", b'"hi"', b"null", b"\xff", b"{'model': 'x'}", b'{"model":"\xff"}', b"[" * 100_000],
    ids=["empty", "open", "array", "text", "null", "bytes", "python", "utf8", "deep"],
)
async def test_what_is_not_json(
    http: httpx.AsyncClient, generator: FakeGenerator, path: str, body: bytes
) -> None:
    param = "model" if b"model" in body and b"\xff" in body else None
    error = await refused(http, generator, path, body, 400, param)
    assert "body" in error["message"] or param


@pytest.mark.parametrize(
    ("body", "param"),
    [
        (raw(b'"temperature":NaN'), "temperature"),
        (raw(b'"temperature":Infinity'), "temperature"),
        (raw(b'"temperature":1e999'), "temperature"),
        (raw(b'"user":"\\ud83e"'), "user"),
        (raw(b'"user":"\xed\xa0\x80"'), "user"),
        (raw(b'"metadata":{"\\ud800":"x"}'), "metadata"),
        (raw(b'"metadata":{"x":"\\udc00"}'), "metadata.x"),
        (raw(b'"max_tokens":' + b"9" * 5000), "max_tokens"),
    ],
)
async def test_json_of_lenient_writers_is_refused_by_field(
    http: httpx.AsyncClient, generator: FakeGenerator, body: bytes, param: str
) -> None:
    await refused(http, generator, COMPLETIONS, body, 400, param)


async def test_nesting_without_end_is_refused(http: httpx.AsyncClient, generator: FakeGenerator) -> None:
    error = await refused(http, generator, COMPLETIONS, raw(b'"logit_bias":' + b"[" * 90_000), 400, None)
    assert "nested" in error["message"]


async def test_missing_fields_are_named(http: httpx.AsyncClient, generator: FakeGenerator) -> None:
    await refused(http, generator, COMPLETIONS, {"model": "test-model"}, 400, "prompt")


async def test_unknown_model(http: httpx.AsyncClient, generator: FakeGenerator) -> None:
    error = await refused(http, generator, CHAT, chat(model="gpt-9"), 404, "model")
    assert error["code"] == "model_not_found"


async def test_context_overflow_has_openais_code(http: httpx.AsyncClient, generator: FakeGenerator) -> None:
    """Clients that shorten their history look for it."""
    error = await refused(http, generator, COMPLETIONS, completion(max_tokens=600), 400, "max_tokens")
    assert error["code"] == "context_length_exceeded"


async def test_body_that_says_it_is_too_large(http: httpx.AsyncClient, generator: FakeGenerator) -> None:
    error = await refused(http, generator, COMPLETIONS, completion(prompt="x" * 100_000), 413, None)
    assert "100000 bytes" in error["message"]


async def test_decision_header(http: httpx.AsyncClient, generator: FakeGenerator) -> None:
    answer = await http.post(COMPLETIONS, json=completion(), headers={"x-disagg-decision": "maybe"})
    assert answer.status_code == 400
    assert answer.json()["error"]["param"] == "x-disagg-decision"


async def test_compressed_bodies_are_refused_as_such(http: httpx.AsyncClient) -> None:
    answer = await http.post(COMPLETIONS, content=b"\x1f\x8b", headers={"content-encoding": "gzip"})
    assert answer.status_code == 415
    assert answer.json()["error"]["param"] == "content-encoding"


async def test_a_key_that_is_not_unicode_names_no_parameter(
    http: httpx.AsyncClient, generator: FakeGenerator
) -> None:
    error = await refused(http, generator, COMPLETIONS, b'{"\\ud800": 1}', 400, None)
    assert "not valid Unicode" in error["message"]
