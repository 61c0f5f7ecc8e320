"""The two endpoints that generate: body in, events out. The hot path of the router's process."""

import time
from collections.abc import Awaitable, Callable
from typing import Final

from msgspec import Struct
from msgspec.structs import replace

from disagg.errors import DisaggError, InvalidRequest, ModelNotFound, WorkerError
from disagg.frontend.exchange import Exchange
from disagg.frontend.formats import DONE, ChatFormat, CompletionFormat, Format, Usage
from disagg.frontend.generator import DecisionOverride, Delta, GenerateRequest, Generator, Ticket
from disagg.frontend.output import SequenceOutput
from disagg.frontend.retirement import Retirement
from disagg.frontend.schemas import Options, parse_chat, parse_completion, plan_max_tokens
from disagg.frontend.stops import StopMatcher
from disagg.frontend.text import TextModel

_OVERRIDES: Final[dict[bytes | None, DecisionOverride | None]] = {
    None: None,
    b"always": "always",
    b"never": "never",
}


class Service(Struct, frozen=True):
    """What the endpoints serve with."""

    generator: Generator
    text: TextModel
    model_name: str
    created: int
    """Unix time at which the model was loaded."""
    max_body_bytes: int
    retirement: Retirement
    is_alive: Callable[[], bool]

    def note(self, exchange: Exchange, error: BaseException) -> None:
        """Put an error in the ledger, where the generator has no record of the request yet."""
        if exchange.submitted or not exchange.path.startswith("/v1/"):
            return
        known = error if isinstance(error, DisaggError) else WorkerError("the frontend failed")
        self.generator.note_rejected(exchange.request_id, exchange.client_request_id, known)


Endpoint = Callable[[Service, Exchange], Awaitable[None]]


async def chat_completions(service: Service, exchange: Exchange) -> None:
    """Answer `POST /v1/chat/completions`."""
    override = _override(exchange)
    body = await exchange.read_body(service.max_body_bytes)
    call = parse_chat(body)
    max_model_len = _max_model_len(service, call.options)
    prompts = await service.text.encode_chat(call, len(body), max_model_len)
    request = _request(exchange, call.options, prompts, max_model_len, "messages", override)
    created = int(time.time())
    form = ChatFormat(exchange.request_id, service.model_name, created, call.options.include_usage)
    await _generate(service, exchange, call.options, request, form)


async def completions(service: Service, exchange: Exchange) -> None:
    """Answer `POST /v1/completions`."""
    override = _override(exchange)
    body = await exchange.read_body(service.max_body_bytes)
    call = parse_completion(body)
    max_model_len = _max_model_len(service, call.options)
    prompts = await service.text.encode_prompts(call, len(body), max_model_len)
    request = _request(exchange, call.options, prompts, max_model_len, "prompt", override)
    created = int(time.time())
    form = CompletionFormat(exchange.request_id, service.model_name, created, call.options.include_usage)
    await _generate(service, exchange, call.options, request, form)


def _override(exchange: Exchange) -> DecisionOverride | None:
    try:
        return _OVERRIDES[exchange.decision]
    except KeyError:
        raise InvalidRequest("x-disagg-decision must be always or never", param="x-disagg-decision") from None


def _max_model_len(service: Service, options: Options) -> int:
    if options.model != service.model_name:
        raise ModelNotFound(
            f"the model {options.model[:200]!r} does not exist; this server has {service.model_name!r}",
            param="model",
        )
    return service.generator.max_model_len(service.model_name)


def _request(
    exchange: Exchange,
    options: Options,
    prompts: list[list[int]],
    max_model_len: int,
    prompt_param: str,
    override: DecisionOverride | None,
) -> GenerateRequest:
    # One limit for all prompts of a request; absent, it is the rest of the longest one's context.
    longest = max(map(len, prompts))
    max_tokens = plan_max_tokens(options, longest, max_model_len, prompt_param)
    return GenerateRequest(
        request_id=exchange.request_id,
        client_request_id=exchange.client_request_id,
        prompts=prompts,
        n=options.n,
        sampling=replace(options.sampling, max_tokens=max_tokens),
        decision_override=override,
        cache_salt=options.cache_salt,
    )


async def _generate(
    service: Service, exchange: Exchange, options: Options, request: GenerateRequest, form: Format
) -> None:
    answer = Answer(service.text, options, request)
    run = _stream if options.stream else _collect
    await run(service.generator, exchange, answer, form)


class Answer:
    """All sequences of one request."""

    def __init__(self, text: TextModel, options: Options, request: GenerateRequest) -> None:
        self.request = request
        self.include_usage = options.include_usage
        self.outputs = [
            SequenceOutput(
                index, text.tokenizer.detokenizer(), StopMatcher(options.stops) if options.stops else None
            )
            for index in range(len(request.prompts) * request.n)
        ]
        self.num_open = len(self.outputs)
        """Sequences that have not ended."""

    def add(self, batch: list[Delta], ticket: Ticket) -> list[SequenceOutput]:
        """Take what has come; return the sequences that it changed, in order of appearance."""
        changed: list[SequenceOutput] = []
        for delta in batch:
            output = self.outputs[delta.index]
            if output.finish is not None:
                continue  # it had ended at a stop string when these were already on their way
            if output.add(delta):
                ticket.stop_sequence(delta.index, output.completion_tokens)
            if output.finish is not None:
                self.num_open -= 1
            if output not in changed:
                changed.append(output)
        return changed

    def usage(self) -> Usage:
        """Count the tokens; of a prompt's choices one computed it, the others may have found it cached."""
        n = self.request.n
        cached = [output.cached_tokens or 0 for output in self.outputs]
        return Usage(
            prompt_tokens=sum(map(len, self.request.prompts)),
            completion_tokens=sum(output.completion_tokens for output in self.outputs),
            cached_tokens=sum(min(cached[first : first + n]) for first in range(0, len(cached), n)),
        )


async def _stream(generator: Generator, exchange: Exchange, answer: Answer, form: Format) -> None:
    last = await _stream_until_last(generator, exchange, answer, form)
    if answer.include_usage:
        last += form.usage_event(answer.usage())
    await exchange.end(last + DONE)


async def _stream_until_last(generator: Generator, exchange: Exchange, answer: Answer, form: Format) -> bytes:
    """Stream all but the last events, which are returned.

    They are sent when the ticket has been left: whoever has read them finds the request settled.
    """
    async with exchange.until_client_leaves():
        exchange.submitted = True
        ticket = await generator.submit(answer.request)
        async with ticket:
            async for batch in ticket:
                events = _events(answer.add(batch, ticket), form)
                if not exchange.started:
                    # Not before there is something to say, so that a refusal can have its status.
                    await exchange.start_stream()
                if not answer.num_open:
                    return events
                if events:
                    await exchange.write(events)
    raise WorkerError("the stream of tokens ended before its sequences")


def _events(changed: list[SequenceOutput], form: Format) -> bytes:
    events = b""
    for output in changed:
        if text := output.take_text():
            events += form.text_event(output.index, text)
        if output.finish is not None:
            events += form.finish_event(output.index, output.finish)
    return events


async def _collect(generator: Generator, exchange: Exchange, answer: Answer, form: Format) -> None:
    async with exchange.until_client_leaves():
        exchange.submitted = True
        ticket = await generator.submit(answer.request)
        async with ticket:
            async for batch in ticket:
                answer.add(batch, ticket)
                if not answer.num_open:
                    break
    if answer.num_open:
        raise WorkerError("the stream of tokens ended before its sequences")
    await exchange.answer(200, form.whole(answer.outputs, answer.usage()))
