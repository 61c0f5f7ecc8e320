import queue
import threading
import time
from collections.abc import Callable, Iterator

import numpy as np
import pytest

from disagg.errors import ConfigError, TransferError
from disagg.protocol import PeerHello, RankEndpoint
from disagg.transfer.base import PoolMemory, Transport
from disagg.transfer.memory import MemoryFabric, MemoryTransport
from disagg.transfer.mover import (
    Arrived,
    AwaitKv,
    Connect,
    Connected,
    Event,
    FinishPush,
    PushChunk,
    PushComplete,
)
from disagg.transfer.thread import TransferThread
from support.transfer import make_hello, make_layout, make_pool

LAYOUT = make_layout()


class Side:
    """One worker of one rank with its thread."""

    def __init__(self, fabric: MemoryFabric, uuid: str, seed: int | None = None) -> None:
        self.pool = make_pool(LAYOUT, seed=seed)
        self.events: queue.SimpleQueue[Event] = queue.SimpleQueue()
        self.crashes: queue.SimpleQueue[Exception] = queue.SimpleQueue()
        self.transport: Transport | None = None

        def make() -> Transport:
            self.transport = MemoryTransport(fabric, uuid=uuid, rank=0, pool=PoolMemory.of_array(self.pool))
            return self.transport

        self.thread = TransferThread(make, LAYOUT, 0, self.events.put, self.crashes.put)
        self.endpoint: RankEndpoint = self.thread.start()

    def hello(self, uuid: str) -> PeerHello:
        assert self.transport is not None
        return make_hello(uuid, uuid, LAYOUT, [self.transport])

    def next_event(self) -> Event:
        return self.events.get(timeout=10.0)


@pytest.fixture
def make_side() -> Iterator[Callable[..., Side]]:
    fabric = MemoryFabric()
    sides: list[Side] = []

    def make(uuid: str, seed: int | None = None) -> Side:
        sides.append(Side(fabric, uuid, seed))
        return sides[-1]

    yield make
    for side in sides:
        side.thread.stop()
    assert not [t for t in threading.enumerate() if t.name.startswith("kv-transfer")]
    assert not fabric.transports


def test_push_between_two_threads(make_side: Callable[..., Side]) -> None:
    source, target = make_side("p", seed=1), make_side("d")
    source.thread.submit(Connect(target.hello("d")))
    assert source.next_event() == Connected("d")
    target.thread.submit(AwaitKv(+1))
    deadline = time.monotonic() + 30.0
    source.thread.submit(PushChunk(("t", 1), "d", [1, 2], [3, 4], deadline))
    source.thread.submit(FinishPush(("t", 1), token_id=5, position=0, finished=False))
    assert isinstance(source.next_event(), PushComplete)
    arrived = target.next_event()
    assert isinstance(arrived, Arrived)
    assert arrived.done.token_id == 5
    np.testing.assert_array_equal(target.pool[[3, 4]], source.pool[[1, 2]])


def test_idle_thread_uses_no_cpu(make_side: Callable[..., Side]) -> None:
    """NIXL's own progress thread would take most of a core here."""
    make_side("p")
    before = time.process_time()
    # Not synchronization: the time over which nothing may happen.
    time.sleep(0.5)
    assert time.process_time() - before < 0.01


def test_failure_to_make_the_transport_is_raised_at_start() -> None:
    def make() -> Transport:
        raise ConfigError("no backend")

    thread = TransferThread(make, LAYOUT, 0, lambda event: None, lambda error: None)
    with pytest.raises(ConfigError, match="no backend"):
        thread.start()


def test_stopping_twice_is_stopping_once(make_side: Callable[..., Side]) -> None:
    side = make_side("p")
    side.thread.stop()
    side.thread.stop()


def test_stopping_what_never_started_does_nothing() -> None:
    """As where another rank's transport could not be made."""

    def make() -> Transport:
        raise AssertionError

    TransferThread(make, LAYOUT, 0, lambda event: None, lambda error: None).stop()


def test_what_was_submitted_before_the_stop_is_done(make_side: Callable[..., Side]) -> None:
    source, target = make_side("p", seed=1), make_side("d")
    source.thread.submit(Connect(target.hello("d")))
    source.thread.submit(PushChunk(("t", 1), "d", [1], [3], time.monotonic() + 30.0))
    source.thread.stop()
    assert source.next_event() == Connected("d")
    np.testing.assert_array_equal(target.pool[3], source.pool[1])


def test_transport_that_does_not_close_is_logged(
    make_side: Callable[..., Side], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Not raised in a thread that nobody hears."""
    side = make_side("p")
    assert side.transport is not None
    close = side.transport.close

    def fail() -> None:
        close()
        raise TransferError("cannot deregister the pool")

    monkeypatch.setattr(side.transport, "close", fail)
    side.thread.stop()
    assert "did not close cleanly" in caplog.text


def test_bug_in_the_thread_is_told(make_side: Callable[..., Side], caplog: pytest.LogCaptureFixture) -> None:
    """Else the worker would live on and wait for KV for ever."""
    side = make_side("p")
    side.thread.submit(AwaitKv(-1))
    assert isinstance(side.crashes.get(timeout=10.0), AssertionError)
    assert "the transfer thread of rank 0 died" in caplog.text
