"""The unmodified `openai` client against the real HTTP server."""

import inspect
import re
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor

import httpx
import openai
import pytest
from openai.resources.chat.completions import Completions as ChatCompletions
from openai.resources.completions import Completions

from disagg.errors import Overloaded, WorkerLost
from disagg.frontend import App, TextModel, create_app
from disagg.frontend.fields import ChatFields, CompletionFields
from disagg.security import ApiKeys
from support.checkpoints import write_tokenizer
from support.generator import FakeGenerator, FakeTicket
from support.http_server import RunningServer, serving

MESSAGES: list[openai.types.chat.ChatCompletionMessageParam] = [
    {"role": "system", "content": "be brief"},
    {"role": "user", "content": [{"type": "text", "text": "hi"}]},
]


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> TextModel:
    folder = tmp_path_factory.mktemp("model")
    write_tokenizer(folder)
    return TextModel.from_folder(folder)


@pytest.fixture
def running(text: TextModel) -> Iterator[RunningServer]:
    def make_app(generator: FakeGenerator) -> App:
        return create_app(
            generator, TextModel(text.tokenizer, text.template), "m", api_keys=ApiKeys(("secret",))
        )

    with serving(make_app) as running:
        yield running


@pytest.fixture
def client(running: RunningServer) -> Iterator[openai.OpenAI]:
    http = httpx.Client(trust_env=False, timeout=20)
    with openai.OpenAI(
        base_url=f"{running.base}/v1", api_key="secret", max_retries=0, http_client=http
    ) as client:
        yield client


@pytest.fixture
def says(running: RunningServer, text: TextModel) -> Callable[[str], None]:
    """Let every sequence say some words, a token at a time, and end."""

    def say(words: str) -> None:
        pieces = [[token_id] for token_id in text.tokenizer.encode(words, False)]
        running.generator.reply = lambda request, index: [*pieces, [2]]

    return say


def test_chat_streams(client: openai.OpenAI, says: Callable[[str], None]) -> None:
    says("the quick 🦊 fox")
    stream = client.chat.completions.create(
        model="m", messages=MESSAGES, stream=True, stream_options={"include_usage": True}, max_tokens=50
    )
    *chunks, last = list(stream)
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == "the quick 🦊 fox"
    assert chunks[0].choices[0].delta.role == "assistant"
    assert [chunk.choices[0].finish_reason for chunk in chunks][-1] == "stop"
    assert last.choices == []
    assert last.usage is not None
    assert last.usage.prompt_tokens_details is not None
    assert last.usage.prompt_tokens_details.cached_tokens == 0
    assert last.usage.total_tokens == last.usage.prompt_tokens + last.usage.completion_tokens


def test_chat_whole(client: openai.OpenAI, says: Callable[[str], None]) -> None:
    says("the fox")
    answer = client.chat.completions.create(
        model="m",
        messages=MESSAGES,
        n=2,
        stop=["never"],
        seed=5,
        temperature=0.7,
        top_p=0.9,
        max_completion_tokens=50,
        extra_body={"top_k": 5, "min_p": 0.1},
        user="someone",
        logprobs=False,
    )
    assert [choice.message.content for choice in answer.choices] == ["the fox", "the fox"]
    assert [choice.finish_reason for choice in answer.choices] == ["stop", "stop"]
    assert answer._request_id is not None
    assert answer.id == f"chatcmpl-{answer._request_id}"


def test_the_clients_own_stream_helper(client: openai.OpenAI, says: Callable[[str], None]) -> None:
    """It accumulates the chunks and fails where they do not fit together."""
    says("the fox")
    with client.chat.completions.stream(model="m", messages=MESSAGES) as stream:
        stream.until_done()
        final = stream.get_final_completion()
    assert final.choices[0].message.content == "the fox"
    assert final.choices[0].finish_reason == "stop"


def test_completions(client: openai.OpenAI, says: Callable[[str], None]) -> None:
    says("the fox")
    whole = client.completions.create(model="m", prompt=["a", "b"], max_tokens=50)
    assert [choice.text for choice in whole.choices] == ["the fox", "the fox"]
    stream = client.completions.create(model="m", prompt=[[5, 6]], max_tokens=50, stream=True)
    assert "".join(chunk.choices[0].text for chunk in stream) == "the fox"


def test_models(client: openai.OpenAI) -> None:
    (model,) = client.models.list().data
    assert client.models.retrieve(model.id).id == "m"


def test_errors_are_of_the_clients_kinds(running: RunningServer, client: openai.OpenAI) -> None:
    def ask(**fields: object) -> None:
        client.chat.completions.create(**({"model": "m", "messages": MESSAGES} | fields))  # type: ignore[call-overload]

    with pytest.raises(openai.BadRequestError) as bad:
        ask(temperature=3)
    assert bad.value.param == "temperature"
    assert bad.value.code == "invalid_value"
    assert bad.value.type == "invalid_request_error"
    assert re.fullmatch(r"[0-9a-f]{32}", bad.value.request_id or "")
    with pytest.raises(openai.NotFoundError):
        ask(model="gpt-9")
    with pytest.raises(openai.AuthenticationError):
        client.with_options(api_key="wrong").models.list()
    running.generator.refusal = Overloaded("full", retry_after_s=2)
    with pytest.raises(openai.RateLimitError) as full:
        ask()
    assert full.value.response.headers["retry-after"] == "2"
    running.generator.refusal = WorkerLost("gone")
    with pytest.raises(openai.InternalServerError):
        ask()


def opened(
    running: RunningServer, client: openai.OpenAI
) -> tuple[openai.Stream[openai.types.Completion], FakeTicket]:
    """Open a stream that has said one token. It is answered only when there is something to say."""
    with ThreadPoolExecutor(1) as threads:
        opening = threads.submit(
            client.completions.create, model="m", prompt="hi", stream=True, max_tokens=50
        )
        ticket = running.ticket()
        running.call(lambda: ticket.push(40))
        return opening.result(20), ticket


def test_an_error_in_a_stream_reaches_the_caller(running: RunningServer, client: openai.OpenAI) -> None:
    stream, ticket = opened(running, client)
    chunks = iter(stream)
    assert next(chunks).choices[0].text
    running.call(lambda: ticket.fail(WorkerLost("gone")))
    with pytest.raises(openai.APIError, match="No worker"):
        next(chunks)


def test_closing_a_stream_aborts_it(running: RunningServer, client: openai.OpenAI) -> None:
    stream, ticket = opened(running, client)
    next(iter(stream))
    stream.close()
    running.wait_for(ticket.left)
    assert ticket.aborted


@pytest.mark.parametrize(
    ("create", "fields"), [(ChatCompletions, ChatFields), (Completions, CompletionFields)]
)
def test_every_parameter_of_the_client_is_known(create: type, fields: type) -> None:
    """What it can send is either supported or refused by name, never called unknown."""
    parameters = set(inspect.signature(create.create).parameters)  # type: ignore[attr-defined]
    own = {"self", "extra_headers", "extra_query", "extra_body", "timeout"}
    assert parameters - own <= set(fields.__struct_fields__)  # type: ignore[attr-defined]
