"""Addresses, errors and events of foreign servers."""

import json

import httpx
import pytest
from hypothesis import given
from hypothesis import strategies as st

from disagg.client import ServerError, ServerUnreachable, base_url, first_model
from disagg.client.server import EventReader, error_of
from disagg.errors import ConfigError


@pytest.mark.parametrize(
    ("url", "base"),
    [
        ("127.0.0.1:8000", "http://127.0.0.1:8000"),
        ("http://127.0.0.1:8000/v1", "http://127.0.0.1:8000"),
        ("https://host/v1/", "https://host"),
        ("https://host/prefix/v1", "https://host/prefix"),
        ("http://[::1]:80", "http://[::1]:80"),
    ],
)
def test_addresses_are_taken_as_people_have_them(url: str, base: str) -> None:
    assert base_url(url) == base


@pytest.mark.parametrize("url", ["", "ftp://host", "http://", "host:99999", "http://host:x", "http://[::1"])
def test_other_addresses_are_refused(url: str) -> None:
    with pytest.raises(ConfigError, match="URL"):
        base_url(url)


STREAM = (
    b": keep-alive\r\n\r\n"
    + b"".join(
        b"data: " + json.dumps({"choices": [{"delta": {"content": text}}], "x": 1}).encode() + b"\n\n"
        for text in ("a", "é", "", "🦊")
    )
    + b'event: x\ndata:{"choices":[],"usage":{"prompt_tokens":3,"completion_tokens":4}}\n\n'
    + b"data: [DONE]\n\n"
)


@given(st.lists(st.integers(1, 40)))
def test_events_are_read_however_they_are_cut(sizes: list[int]) -> None:
    reader = EventReader()
    chunks = []
    start = 0
    for size in [*sizes, len(STREAM)]:
        chunks += list(reader.feed(STREAM[start : start + size]))
        start += size
    assert "".join(choice.said() for chunk in chunks for choice in chunk.choices) == "aé🦊"
    assert chunks[-1].usage is not None
    assert chunks[-1].usage.completion_tokens == 4
    assert reader.done


@pytest.mark.parametrize(
    ("event", "text"),
    [
        ({"choices": [{"text": "a"}]}, "a"),
        ({"choices": [{"delta": {"reasoning_content": "a", "content": None}}]}, "a"),
        ({"choices": [{"delta": {"reasoning": "a"}}]}, "a"),
        ({"choices": [{"delta": {"role": "assistant"}}]}, ""),
        ({"choices": [{"index": 0, "finish_reason": "stop"}], "usage": None}, ""),
    ],
)
def test_text_of_either_endpoint_and_of_reasoning(event: object, text: str) -> None:
    (chunk,) = EventReader().feed(b"data: " + json.dumps(event).encode() + b"\n")
    assert "".join(choice.said() for choice in chunk.choices) == text


@pytest.mark.parametrize("data", [b'data: {"choices": 5}\n', b"data: <html>\n", b"data: \xff\n"])
def test_what_is_no_event_is_said_to_be_none(data: bytes) -> None:
    with pytest.raises(ServerError, match="no chunk"):
        list(EventReader().feed(data))


def test_an_error_in_a_stream_is_raised_in_the_servers_words() -> None:
    with pytest.raises(ServerError, match="out of pages"):
        list(EventReader().feed(b'data: {"error": {"message": "out of pages", "code": 500}}\n'))


@pytest.mark.parametrize(
    ("body", "message", "code"),
    [
        (b'{"error": {"message": "no", "code": "x"}}', "no", "x"),
        (b'{"error": {"message": "no", "code": 400}}', "no", "400"),
        (b'{"error": "no"}', "no", None),
        (b'{"detail": "no"}', "the server answered with status 400", None),
        (b"<html>", "the server answered with status 400", None),
    ],
)
def test_errors_of_any_server(body: bytes, message: str, code: str | None) -> None:
    error = error_of(400, body)
    assert (str(error), error.status, error.code) == (message, 400, code)


def client(handler: object) -> httpx.Client:
    return httpx.Client(base_url="http://test", transport=httpx.MockTransport(handler))  # type: ignore[arg-type]


def test_the_first_model_is_asked_for() -> None:
    with client(lambda request: httpx.Response(200, json={"data": [{"id": "a"}, {"id": "b"}]})) as http:
        assert first_model(http) == "a"


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        (httpx.Response(200, json={"data": []}), "no model"),
        (httpx.Response(200, text="<html>"), "not a list"),
        (httpx.Response(401, json={"error": {"message": "a key is needed"}}), "a key is needed"),
    ],
)
def test_a_server_without_models(answer: httpx.Response, message: str) -> None:
    with client(lambda request: answer) as http, pytest.raises(ServerError, match=message):
        first_model(http)


def test_nobody_there() -> None:
    def refuse(request: httpx.Request) -> httpx.Response:
        raise httpx.ConnectError("refused")

    with client(refuse) as http, pytest.raises(ServerUnreachable, match=r"http://test.*refused"):
        first_model(http)
