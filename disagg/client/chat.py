"""A conversation with a server in the terminal.

`Conversation` keeps what has been said and knows no terminal; `ChatServer` streams one answer;
`run_chat` reads lines and writes text until the input ends.
"""

import asyncio
import re
import time
from collections.abc import AsyncGenerator, Callable
from contextlib import aclosing
from typing import Any

import httpx
from msgspec import Struct

from disagg.client.server import EventReader, ServerError, error_of, unreachable
from disagg.errors import DisaggError

HELP = """/new          start over
/system TEXT  start over with these instructions; without TEXT, with none
/retry        ask the last question again
/help         this list
/exit         leave, as Ctrl-D does; Ctrl-C stops an answer"""

Message = dict[str, str]

_CONTROL = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]")
"""C0 and C1 without newline and tab, and the marks that turn the direction of text around."""


class Conversation:
    """Messages of both sides. It always ends with the assistant's, so that it can be continued."""

    def __init__(self, system: str | None = None) -> None:
        self.system = system
        self._turns: list[tuple[str, str]] = []

    def __len__(self) -> int:
        """Count the questions that have been answered."""
        return len(self._turns)

    def asking(self, question: str) -> list[Message]:
        """What to send in order to ask; the conversation is as before until it is `answered`."""
        messages: list[Message] = [{"role": "system", "content": self.system}] if self.system else []
        for asked, answer in self._turns:
            messages += [{"role": "user", "content": asked}, {"role": "assistant", "content": answer}]
        return [*messages, {"role": "user", "content": question}]

    def answered(self, question: str, answer: str) -> None:
        """Keep a turn. One that has no answer is not kept: the next question would follow a question."""
        if answer:
            self._turns.append((question, answer))

    def take_back(self) -> str | None:
        """Forget the last turn and return its question."""
        return self._turns.pop()[0] if self._turns else None

    def start_over(self) -> None:
        """Forget all turns, and keep the instructions."""
        self._turns.clear()


class ChatServer:
    """A server, its model, and how it is to answer. `connect` makes a client; each answer has its own."""

    def __init__(self, connect: Callable[[], httpx.AsyncClient], model: str, options: dict[str, Any]) -> None:
        self._connect = connect
        self.model = model
        self._options = options
        self.completion_tokens: int | None = None
        """Of the last answer, where it came to its end and the server counts."""

    async def stream(self, messages: list[Message]) -> AsyncGenerator[str]:
        """Yield an answer's text as it comes. Close it to make the server stop.

        Raises:
            ServerError, ServerUnreachable: There is no answer, or no end of it.
        """
        self.completion_tokens = None
        body = {
            "model": self.model,
            "messages": messages,
            "stream": True,
            "stream_options": {"include_usage": True},
            **self._options,
        }
        async with self._connect() as http:
            try:
                async with aclosing(self._read(http, body)) as texts:
                    async for text in texts:
                        yield text
            except httpx.HTTPError as error:
                raise unreachable(str(http.base_url), error) from error

    async def _read(self, http: httpx.AsyncClient, body: dict[str, Any]) -> AsyncGenerator[str]:
        reader = EventReader()
        async with http.stream("POST", "/v1/chat/completions", json=body) as answer:
            if answer.status_code != 200:
                raise error_of(answer.status_code, await answer.aread())
            async for data in answer.aiter_bytes():
                for chunk in reader.feed(data):
                    if chunk.usage is not None:
                        self.completion_tokens = chunk.usage.completion_tokens
                    for text in filter(None, (choice.said() for choice in chunk.choices)):
                        yield text
        if not reader.done:
            raise ServerError("the answer broke off")


class Terminal(Struct, frozen=True):
    """Where `run_chat` reads and writes."""

    read: Callable[[], str]
    """Returns a line. Raises EOFError at the end, KeyboardInterrupt at Ctrl-C."""
    write: Callable[[str], None]
    """Writes a part of an answer at once."""
    note: Callable[[str], None]
    """Writes a line that is no part of an answer."""
    clock: Callable[[], float] = time.monotonic


def run_chat(server: ChatServer, conversation: Conversation, terminal: Terminal) -> int:
    """Take lines and answer them until the input ends; return how many got an error for an answer."""
    with asyncio.Runner() as runner:
        return _converse(server, conversation, terminal, runner)


def _converse(
    server: ChatServer, conversation: Conversation, terminal: Terminal, runner: asyncio.Runner
) -> int:
    num_failed = 0
    while True:
        try:
            line = terminal.read().strip()
        except KeyboardInterrupt:
            terminal.note("Ctrl-D or /exit leaves.")
            continue
        except EOFError:
            return num_failed
        if line == "/exit":
            return num_failed
        question = _command(line, conversation, terminal) if line.startswith("/") else line
        if question:
            num_failed += not _answer(server, conversation, question, terminal, runner)


def printable(text: str) -> str:
    """Drop control characters: a model's text must not steer the terminal that shows it."""
    return _CONTROL.sub("", text)


def _command(line: str, conversation: Conversation, terminal: Terminal) -> str | None:
    """Do what a line with a slash says; return a question where it is to be asked."""
    name, _, text = line.partition(" ")
    match name:
        case "/new":
            conversation.start_over()
            terminal.note("A new conversation.")
        case "/system":
            conversation.system = text.strip() or None
            conversation.start_over()
            terminal.note("A new conversation with these instructions." if text else "No instructions.")
        case "/retry":
            question = conversation.take_back()
            if question is None:
                terminal.note("Nothing has been asked yet.")
            return question
        case "/help":
            terminal.note(HELP)
        case _:
            terminal.note(f"{name} is unknown; /help lists the commands.")
    return None


def _answer(
    server: ChatServer,
    conversation: Conversation,
    question: str,
    terminal: Terminal,
    runner: asyncio.Runner,
) -> bool:
    """Show an answer and keep it; False if an error came instead.

    In an event loop, for Ctrl-C there cancels a task, at its next wait. As an exception it may come at any
    instruction: also where it is swallowed, or the library has a connection and nobody to close it, and
    the server would go on with the answer.
    """
    began = terminal.clock()
    first_at: float | None = None
    said: list[str] = []

    async def show() -> None:
        nonlocal first_at
        async with aclosing(server.stream(conversation.asking(question))) as stream:
            async for text in stream:
                first_at = terminal.clock() if first_at is None else first_at
                said.append(text)
                terminal.write(printable(text))

    try:
        runner.run(show())
        terminal.write("\n")
    except KeyboardInterrupt:
        terminal.write("\n")
        terminal.note("(stopped)")
    except DisaggError as error:
        if said:
            terminal.write("\n")
        terminal.note(_advice(error))
        return False
    conversation.answered(question, "".join(said))
    if server.completion_tokens and first_at is not None:
        terminal.note(_speed(server.completion_tokens, first_at - began, terminal.clock() - first_at))
    return True


def _advice(error: DisaggError) -> str:
    if isinstance(error, ServerError) and error.code == "context_length_exceeded":
        return f"The conversation no longer fits the model; /new starts over. ({error})"
    return f"{error}\nThe question was not kept; ask it again."


def _speed(num_tokens: int, first_s: float, rest_s: float) -> str:
    rate = f", {(num_tokens - 1) / rest_s:.1f} tokens/s" if num_tokens > 1 and rest_s > 0 else ""
    return f"({num_tokens} tokens, first after {first_s * 1000:.0f} ms{rate})"
