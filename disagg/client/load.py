"""Ask a server many things at once, and note when each answer's pieces come."""

import asyncio
import json
from collections.abc import Callable, Sequence
from itertools import pairwise
from time import perf_counter
from typing import Any, Literal

from msgspec import Struct, field

from disagg.client.connection import Connections
from disagg.client.server import EventReader, ServerError, Usage, error_of
from disagg.client.workload import Prompt
from disagg.errors import DisaggError

MAX_ERROR_BYTES = 65536

Kind = Literal["completions", "chat"]


class Load(Struct, frozen=True, kw_only=True):
    """How to ask."""

    url: str
    """Without `/v1`."""
    model: str
    kind: Kind = "completions"
    headers: dict[str, str] = {}
    max_concurrency: int | None = None
    """Requests at a time; others wait for their turn, and their clock starts with it."""
    ignore_eos: bool = True
    extra_body: dict[str, Any] = {}


class Outcome(Struct):
    """What came of one request. Instants are on `perf_counter`."""

    started_at: float = 0.0
    ended_at: float = 0.0
    text_at: list[float] = field(default_factory=list)
    """When each event with text came."""
    usage: Usage | None = None
    error: str | None = None

    @property
    def output_tokens(self) -> int:
        """As the server counts them, or else one an event."""
        return self.usage.completion_tokens if self.usage is not None else len(self.text_at)

    @property
    def latency_s(self) -> float:
        """From sending to the last byte."""
        return self.ended_at - self.started_at

    @property
    def ttft_s(self) -> float | None:
        """From sending to the first text."""
        return self.text_at[0] - self.started_at if self.text_at else None

    @property
    def itl_s(self) -> list[float]:
        """Between one event with text and the next."""
        return [after - before for before, after in pairwise(self.text_at)]


async def run_load(
    load: Load,
    prompts: Sequence[Prompt],
    arrivals: Sequence[float],
    on_done: Callable[[Outcome], None] = lambda _: None,
) -> list[Outcome]:
    """Send every prompt at its time, and wait for all answers.

    Args:
        load: Where, and how.
        prompts: What to ask.
        arrivals: When, in seconds from now, ascending; as many as `prompts`.
        on_done: Told of each answer that is complete.

    Returns:
        One outcome a prompt, in their order. A failed request is an outcome too.
    """
    turns = asyncio.Semaphore(load.max_concurrency or len(prompts) or 1)

    async def one(connections: Connections, prompt: Prompt) -> Outcome:
        async with turns:
            outcome = await _ask(connections, load, prompt)
        on_done(outcome)
        return outcome

    async with Connections(load.url, load.headers) as connections, asyncio.TaskGroup() as tasks:
        running = []
        began = perf_counter()
        for prompt, at_s in zip(prompts, arrivals, strict=True):
            if (wait_s := began + at_s - perf_counter()) > 0:
                await asyncio.sleep(wait_s)
            running.append(tasks.create_task(one(connections, prompt)))
    return [task.result() for task in running]


async def _ask(connections: Connections, load: Load, prompt: Prompt) -> Outcome:
    path, body = _request(load, prompt)
    outcome = Outcome()
    reader = EventReader()
    raw = bytearray()

    def on_body(data: bytes, now: float) -> None:
        if len(raw) < MAX_ERROR_BYTES:
            raw.extend(data)
        for chunk in reader.feed(data):
            if chunk.usage is not None:
                outcome.usage = chunk.usage
            if any(choice.said() for choice in chunk.choices):
                outcome.text_at.append(now)

    outcome.started_at = perf_counter()
    try:
        status = await connections.post(path, body, on_body)
        if status != 200:
            raise error_of(status, bytes(raw))
        if not reader.done:
            raise ServerError("the answer broke off")
    except DisaggError as error:
        outcome.error = str(error)
    outcome.ended_at = perf_counter()
    return outcome


def _request(load: Load, prompt: Prompt) -> tuple[str, bytes]:
    body: dict[str, Any] = {
        "model": load.model,
        "max_tokens": prompt.max_tokens,
        "temperature": 0,
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    if load.ignore_eos:
        body["ignore_eos"] = True
    if load.kind == "chat":
        path = "/v1/chat/completions"
        body["messages"] = [{"role": "user", "content": prompt.text}]
    else:
        path = "/v1/completions"
        body["prompt"] = prompt.text
    return path, json.dumps(body | load.extra_body).encode()
