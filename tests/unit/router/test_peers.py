"""Whom a router asks for a record, and whose answer counts. Links are played."""

import asyncio
from collections.abc import Callable, Coroutine
from typing import Any

import pytest

from disagg.errors import ConfigError
from disagg.links import LinkEvents
from disagg.protocol import AskRecord, RecordAnswer, ToWorker
from disagg.router.peers import RouterPeers

TURNS = 20
"""Of the loop: all that can happen without time has happened."""


class PlayedLink:
    def __init__(self, events: LinkEvents[RecordAnswer]) -> None:
        self.events = events
        self.is_connected = True
        self.asked: list[str] = []
        self.is_closed = False

    def send(self, message: ToWorker | AskRecord) -> bool:
        assert isinstance(message, AskRecord)
        if self.is_connected:
            self.asked.append(message.request_id)
        return self.is_connected

    def answer(self, record: bytes | None, request_id: str = "r1") -> None:
        self.events.on_message(RecordAnswer(request_id, record))

    def close(self) -> None:
        self.is_closed = True

    def reset(self, reason: str) -> None: ...

    def drain(self) -> None: ...


class Peers:
    """A router that knows others, by name."""

    def __init__(self, *names: str) -> None:
        self.links: dict[str, PlayedLink] = {}
        self.peers = RouterPeers(self)
        self.peers.on_members(names)

    def open_peer(self, address: str, events: LinkEvents[RecordAnswer]) -> PlayedLink:
        if address == "nonsense":
            raise ConfigError("no address")
        link = self.links[address] = PlayedLink(events)
        return link

    async def asking(self, request_id: str = "r1") -> "asyncio.Task[bytes | None]":
        task = asyncio.create_task(self.peers.ask(request_id))
        await turn()
        return task


async def turn() -> None:
    for _ in range(TURNS):
        await asyncio.sleep(0)


def run(test: Callable[[], Coroutine[Any, Any, None]]) -> None:
    asyncio.run(test())


async def ended(task: "asyncio.Task[bytes | None]") -> bytes | None:
    """Its result, which must be there without waiting."""
    await turn()
    assert task.done()
    return await task


def test_who_says_first_that_it_has_nothing_does_not_speak_for_the_others() -> None:
    async def test() -> None:
        peers = Peers("a", "b")
        asking = await peers.asking()
        peers.links["a"].answer(None)
        await turn()
        assert not asking.done()
        peers.links["b"].answer(b"record")
        assert await ended(asking) == b"record"

    run(test)


def test_a_record_is_taken_from_the_first_who_has_it() -> None:
    async def test() -> None:
        peers = Peers("a", "b")
        asking = await peers.asking()
        peers.links["b"].answer(b"record")
        assert await ended(asking) == b"record"
        peers.links["a"].answer(None)  # nobody waits for it any more

    run(test)


def test_when_all_have_said_no_nobody_is_waited_for() -> None:
    async def test() -> None:
        peers = Peers("a", "b")
        asking = await peers.asking()
        for link in peers.links.values():
            link.answer(None)
        assert await ended(asking) is None

    run(test)


def test_who_is_not_connected_is_not_waited_for() -> None:
    """It is asked nothing, so it would answer nothing."""

    async def test() -> None:
        peers = Peers("a", "b")
        peers.links["a"].is_connected = False
        asking = await peers.asking()
        peers.links["b"].answer(None)
        assert await ended(asking) is None
        peers.links["b"].is_connected = False
        assert await ended(await peers.asking()) is None

    run(test)


@pytest.mark.parametrize("is_removed", [True, False])
def test_who_goes_while_asked_is_not_waited_for(is_removed: bool) -> None:
    async def test() -> None:
        peers = Peers("a", "b")
        asking = await peers.asking()
        peers.links["b"].answer(None)
        if is_removed:
            peers.peers.on_members(["b"])
            assert peers.links["a"].is_closed
        else:
            peers.links["a"].events.on_down("disconnected")
        assert await ended(asking) is None

    run(test)


def test_one_answer_serves_all_who_wait_for_it_and_no_others() -> None:
    async def test() -> None:
        peers = Peers("a")
        first, second, other = [await peers.asking(r) for r in ("r1", "r1", "r2")]
        peers.links["a"].answer(b"record")
        assert (await ended(first), await ended(second)) == (b"record", b"record")
        assert not other.done()
        peers.links["a"].answer(None, "r2")
        assert await ended(other) is None

    run(test)


@pytest.mark.parametrize("turns", range(6))
def test_a_client_that_leaves_does_not_end_the_wait_of_another(turns: int) -> None:
    """Whenever the answer comes: cancelling takes the loop some turns."""

    async def test() -> None:
        peers = Peers("a")
        leaving, staying = await peers.asking(), await peers.asking()
        leaving.cancel()
        for _ in range(turns):
            await asyncio.sleep(0)
        peers.links["a"].answer(b"record")
        assert await ended(staying) == b"record"

    run(test)


def test_what_nobody_waits_for_any_more_is_forgotten() -> None:
    """A router that never answers would else be a leak."""

    async def test() -> None:
        peers = Peers("a")
        first, second = await peers.asking(), await peers.asking()
        (waiting,) = [peer._waiting for peer in peers.peers._peers.values()]
        for leaving, num_left in ((first, 1), (second, 0)):
            leaving.cancel()
            await turn()
            assert [len(answers) for answers in waiting.values()] == [1] * num_left

    run(test)


def test_an_address_that_cannot_be_spoken_to_does_not_hide_the_others() -> None:
    async def test() -> None:
        peers = Peers("nonsense", "z")
        asking = await peers.asking()
        peers.links["z"].answer(b"record")
        assert await ended(asking) == b"record"

    run(test)


def test_only_what_is_new_is_connected_to() -> None:
    async def test() -> None:
        peers = Peers("a")
        link = peers.links["a"]
        peers.peers.on_members(["a", "b"])
        assert peers.links["a"] is link
        assert not link.is_closed
        peers.peers.close()
        assert all(link.is_closed for link in peers.links.values())

    run(test)
