"""The terminal chat, without a terminal or a server."""

import asyncio
import json
import signal
import sys
from collections.abc import AsyncIterator, Callable, Iterator
from types import FrameType
from typing import Any

import httpx
import pytest

from disagg.client import ChatServer, Conversation, run_chat
from disagg.client.chat import HELP, Terminal, printable
from support.clock import FakeClock


def events(*texts: str, tokens: int | None = 2) -> bytes:
    chunks: list[dict[str, Any]] = [{"choices": [{"delta": {"content": text}}]} for text in texts]
    if tokens is not None:
        chunks.append({"choices": [], "usage": {"prompt_tokens": 1, "completion_tokens": tokens}})
    return (
        b"".join(b"data: " + json.dumps(chunk).encode() + b"\n\n" for chunk in chunks) + b"data: [DONE]\n\n"
    )


@pytest.fixture(autouse=True)
def _ctrl_c_is_heard() -> Iterator[None]:
    """Who starts the tests in the background may have it ignored."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


class Session:
    """A chat with scripted lines and answers; keeps what was asked and shown."""

    def __init__(self, answers: list[Callable[[], httpx.Response]], system: str | None = None) -> None:
        self.asked: list[list[dict[str, str]]] = []
        self.bodies: list[dict[str, Any]] = []
        self.shown = ""
        self.notes: list[str] = []
        self.conversation = Conversation(system)
        self.clients: list[httpx.AsyncClient] = []
        self.clock = FakeClock()
        self._answers = iter(answers)

    def run(self, *lines: str | type[BaseException]) -> int:
        script = iter([*lines, EOFError])

        def read() -> str:
            line = next(script)
            if isinstance(line, type):
                raise line
            return line

        server = ChatServer(self._connect, "m", {"temperature": 0})
        terminal = Terminal(read, self._write, self.notes.append, self.clock)
        return run_chat(server, self.conversation, terminal)

    def _connect(self) -> httpx.AsyncClient:
        transport = httpx.MockTransport(self._handle)
        self.clients.append(httpx.AsyncClient(base_url="http://test", transport=transport))
        return self.clients[-1]

    def _handle(self, request: httpx.Request) -> httpx.Response:
        body = json.loads(request.content)
        self.bodies.append(body)
        self.asked.append(body["messages"])
        return next(self._answers)()

    def _write(self, text: str) -> None:
        self.shown += text
        self.clock.advance(0.5)


def says(*texts: str) -> Callable[[], httpx.Response]:
    return lambda: httpx.Response(200, content=events(*texts))


def fails(status: int, message: str, code: str | None = None) -> Callable[[], httpx.Response]:
    return lambda: httpx.Response(status, json={"error": {"message": message, "code": code}})


def user(text: str) -> dict[str, str]:
    return {"role": "user", "content": text}


def assistant(text: str) -> dict[str, str]:
    return {"role": "assistant", "content": text}


def test_each_question_carries_what_was_said_before() -> None:
    session = Session([says("Par", "is"), says("2 million")], system="Be brief.")
    session.run("Capital of France?", "", "How many live there?")
    system = {"role": "system", "content": "Be brief."}
    assert session.asked == [
        [system, user("Capital of France?")],
        [system, user("Capital of France?"), assistant("Paris"), user("How many live there?")],
    ]
    assert session.shown == "Paris\n2 million\n"
    assert session.bodies[0]["stream"] is True
    assert session.bodies[0]["temperature"] == 0


def test_the_speed_is_shown() -> None:
    session = Session([says("a", "b")])
    session.run("hi")
    # the clock moves half a second with each text and with the line's end
    assert session.notes == ["(2 tokens, first after 0 ms, 0.7 tokens/s)"]


def _is_answering() -> bool:
    """Whether the task that shows an answer runs, and not the event loop's own."""
    task = asyncio.current_task() if asyncio._get_running_loop() is not None else None
    return task is not None and task.get_coro().__name__ == "show"


class CtrlC:
    """Sends SIGINT at the `nth` line that runs while an answer is read; counts the lines."""

    def __init__(self, nth: int | None = None) -> None:
        self._nth = nth
        self.num_lines = 0

    def __enter__(self) -> "CtrlC":
        sys.settrace(self._trace)
        return self

    def __exit__(self, *_: object) -> None:
        sys.settrace(None)

    def _trace(self, frame: FrameType, event: str, arg: object) -> Any:
        if event == "line" and _is_answering():
            self.num_lines += 1
            if self.num_lines == self._nth:
                signal.raise_signal(signal.SIGINT)
        return self._trace


def test_ctrl_c_at_any_instruction_leaves_no_connection() -> None:
    with CtrlC() as whole:
        Session([says("a", "b")]).run("hi")
    assert whole.num_lines > 500
    for nth in range(1, whole.num_lines, whole.num_lines // 60):
        session = Session([says("a", "b"), says("ok")])
        with CtrlC(nth):
            assert session.run("hi") == 0
        assert "(stopped)" in session.notes or session.shown == "ab\n", f"line {nth}: {session.notes}"
        assert all(client.is_closed for client in session.clients), f"line {nth}"


def test_commands() -> None:
    session = Session([says("one"), says("two"), says("three"), says("four")])
    session.run(
        "/retry", "/help", "/nope", "hi", "/retry", "/new", "again", "/system Be kind.", "hello", "/exit"
    )
    assert session.asked[1] == [user("hi")], "/retry asks the same, as if it had not been answered"
    assert session.asked[2] == [user("again")]
    assert session.asked[3] == [{"role": "system", "content": "Be kind."}, user("hello")]
    assert session.notes[0] == "Nothing has been asked yet."
    assert session.notes[1] == HELP
    assert session.notes[2].startswith("/nope is unknown")


def test_ctrl_c_at_the_prompt_does_not_leave() -> None:
    session = Session([says("one")])
    session.run(KeyboardInterrupt, "hi")
    assert session.notes[0] == "Ctrl-D or /exit leaves."
    assert session.shown == "one\n"


def interrupted(*texts: str) -> Callable[[], httpx.Response]:
    async def content() -> AsyncIterator[bytes]:
        for text in texts:
            yield events(text).partition(b"\n\n")[0] + b"\n\n"
        signal.raise_signal(signal.SIGINT)
        await asyncio.sleep(10)

    return lambda: httpx.Response(200, content=content())


def test_ctrl_c_stops_an_answer_and_keeps_what_was_said() -> None:
    session = Session([interrupted("Once upon"), says("ok")])
    session.run("Tell a story.", "Thanks.")
    assert session.notes[0] == "(stopped)"
    assert session.asked[1] == [user("Tell a story."), assistant("Once upon"), user("Thanks.")]


def test_ctrl_c_where_exceptions_are_swallowed_stops_an_answer() -> None:
    """Nothing that `__del__` raises comes out of it, and any line may be the last of an object."""

    class Dropped:
        def __del__(self) -> None:
            signal.raise_signal(signal.SIGINT)

    async def content() -> AsyncIterator[bytes]:
        dropped = Dropped()
        yield events("Once").partition(b"\n\n")[0] + b"\n\n"
        del dropped
        await asyncio.sleep(1)
        yield b"data: [DONE]\n\n"

    session = Session([lambda: httpx.Response(200, content=content())])
    assert session.run("Tell a story.") == 0
    assert session.notes == ["(stopped)"]
    assert session.clients[0].is_closed


def test_ctrl_c_before_the_first_word_leaves_no_trace() -> None:
    session = Session([interrupted(), says("ok")])
    session.run("Tell a story.", "Hello?")
    assert session.asked[1] == [user("Hello?")]


@pytest.mark.parametrize(
    ("answer", "note"),
    [
        (fails(503, "no worker"), "no worker"),
        (fails(400, "too long", "context_length_exceeded"), "/new"),
        (lambda: httpx.Response(200, content=b"data: [oops]\n\n"), "no chunk"),
        (lambda: httpx.Response(200, content=events("half").partition(b"data: [DONE]")[0]), "broke off"),
    ],
)
def test_a_question_that_fails_is_not_kept(answer: Callable[[], httpx.Response], note: str) -> None:
    """Two questions in a row are refused by many chat templates."""
    session = Session([answer, says("ok")])
    assert session.run("hi", "hello") == 1, "a script must learn of it"
    assert note in session.notes[0]
    assert session.asked[1] == [user("hello")]


def test_a_model_cannot_steer_the_terminal() -> None:
    """Escape sequences can rename the window, hide text or type into the shell."""
    session = Session([says("a\x1b[2J\x1b]0;x\x07b\r\u202ec\x9b1m\td\n👩🏽\u200d🚀é")])
    session.run("hi")
    assert session.shown == "a[2J]0;xbc1m\td\n👩🏽\u200d🚀é\n"
    assert printable("plain ß 世界") == "plain ß 世界"
