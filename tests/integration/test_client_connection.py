"""The load generator's HTTP client against servers of all manners."""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager

import pytest

from disagg.client import Load, Outcome, ServerUnreachable, run_load
from disagg.client.connection import Connections
from disagg.client.workload import Prompt

EVENT = b'data: {"choices": [{"text": "a"}]}\n\n'
DONE = b"data: [DONE]\n\n"
Behaviour = Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]


def sized(body: bytes) -> bytes:
    return b"HTTP/1.1 200 OK\r\ncontent-length: %d\r\n\r\n%b" % (len(body), body)


def chunked(*pieces: bytes, end: bool = True) -> bytes:
    chunks = b"".join(b"%x\r\n%b\r\n" % (len(piece), piece) for piece in pieces)
    return b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n" + chunks + (b"0\r\n\r\n" if end else b"")


async def read_request(reader: asyncio.StreamReader) -> bytes:
    head = await reader.readuntil(b"\r\n\r\n")
    length = int(head.lower().split(b"content-length: ")[1].split(b"\r\n")[0])
    return head + await reader.readexactly(length)


@asynccontextmanager
async def answering(*answers: bytes, keep: int = 10**6) -> AsyncIterator[tuple[str, list[int]]]:
    """Give each request the next answer; close a connection after `keep` of them.

    Yields the address, and a list that gets the number of its connection for each request.
    """
    served: list[int] = []
    num_connections = 0
    script = iter(answers)

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal num_connections
        num_connections += 1
        mine = num_connections
        try:
            for _ in range(keep):
                await read_request(reader)
                served.append(mine)
                writer.write(next(script))
                await writer.drain()
        except (asyncio.IncompleteReadError, ConnectionError):
            pass
        finally:
            writer.close()

    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    try:
        yield f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}", served
    finally:
        server.close()
        await asyncio.sleep(0)


async def ask(url: str, times: int = 1) -> list[Outcome]:
    load = Load(url=url, model="m", max_concurrency=1)
    return await run_load(load, [Prompt("hi", 5)] * times, [0.0] * times)


def test_a_connection_is_used_again() -> None:
    async def main() -> None:
        async with answering(sized(EVENT + DONE), chunked(EVENT, DONE), sized(DONE)) as (url, served):
            outcomes = await ask(url, 3)
        assert [outcome.error for outcome in outcomes] == [None] * 3
        assert [len(outcome.text_at) for outcome in outcomes] == [1, 1, 0]
        assert served == [1, 1, 1]

    asyncio.run(main())


def test_a_server_may_close_between_requests() -> None:
    """That is its right, and no failure of the request that comes at the same moment."""

    async def main() -> None:
        async with answering(*[sized(EVENT + DONE)] * 4, keep=1) as (url, served):
            outcomes = await ask(url, 4)
        assert [outcome.error for outcome in outcomes] == [None] * 4
        assert served == [1, 2, 3, 4]

    asyncio.run(main())


@pytest.mark.parametrize(
    ("answer", "error"),
    [
        (b"HTTP/1.1 200 OK\r\nconnection: close\r\n\r\n" + EVENT + DONE, None),
        (b"HTTP/1.1 200 OK\r\n\r\n" + EVENT, "broke off"),
        (chunked(EVENT, end=False), "no answer"),
        (chunked(EVENT), "broke off"),
        (sized(EVENT + DONE)[:-5], "no answer"),
        (b"", "no answer"),
        (b"garbage\r\n\r\n", "not valid HTTP"),
        (chunked(b"data: {oops\n\n", DONE), "no chunk"),
        (chunked(EVENT, b'data: {"error": {"message": "out of pages"}}\n\n'), "out of pages"),
        (b'HTTP/1.1 429 X\r\ncontent-length: 30\r\n\r\n{"error": {"message": "full"}} ', "full"),
        (b"HTTP/1.1 502 X\r\ncontent-length: 6\r\n\r\n<html>", "status 502"),
    ],
)
def test_what_a_server_may_answer(answer: bytes, error: str | None) -> None:
    async def main() -> None:
        async with answering(answer, keep=1) as (url, _):
            (outcome,) = await ask(url)
        if error is None:
            assert outcome.error is None
            assert len(outcome.text_at) == 1
        else:
            assert error in (outcome.error or "")

    asyncio.run(main())


def test_nobody_there_is_an_outcome() -> None:
    (outcome,) = asyncio.run(ask("http://127.0.0.1:9"))
    assert "no answer from http://127.0.0.1:9" in (outcome.error or "")


def test_a_request_that_was_answered_in_part_is_not_sent_again() -> None:
    async def main() -> None:
        body = b"HTTP/1.1 200 OK\r\ncontent-length: 100\r\n\r\nx"
        async with answering(sized(b"ok"), body, sized(b"ok"), keep=2) as (url, served):
            async with Connections(url, {}) as connections:
                assert await connections.post("/", b"", lambda *_: None) == 200
                with pytest.raises(ServerUnreachable):
                    await connections.post("/", b"", lambda *_: None)
            assert served == [1, 1]

    asyncio.run(main())


def test_headers_and_prefix_are_sent() -> None:
    async def main() -> None:
        seen: list[bytes] = []

        async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            seen.append(await read_request(reader))
            writer.write(sized(b""))
            writer.close()

        server = await asyncio.start_server(serve, "127.0.0.1", 0)
        port = server.sockets[0].getsockname()[1]
        async with Connections(f"http://127.0.0.1:{port}/api", {"authorization": "Bearer k"}) as connections:
            await connections.post("/v1/x", b"body", lambda *_: None)
        server.close()
        head, _, body = seen[0].partition(b"\r\n\r\n")
        assert head.startswith(b"POST /api/v1/x HTTP/1.1\r\nhost: 127.0.0.1:%d\r\n" % port)
        assert b"authorization: Bearer k" in head
        assert body == b"body"

    asyncio.run(main())
