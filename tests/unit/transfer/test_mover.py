from collections.abc import Callable

import msgspec
import numpy as np
import pytest

from disagg.errors import LayoutMismatch, LinkLost, TransferError, TransferTimeout
from disagg.protocol import KvLayout, PeerHello, PushDone, encode
from disagg.transfer.base import PoolMemory
from disagg.transfer.memory import MemoryFabric, MemoryTransport
from disagg.transfer.mover import (
    AWAIT_POLL_S,
    DRAIN_S,
    MAX_CLOSED,
    NOTIFY_LINGER_S,
    SETTLE_S,
    STUCK_POLL_S,
    AbortPush,
    Arrived,
    AwaitKv,
    Connect,
    Connected,
    ConnectFailed,
    Disconnect,
    Drain,
    Drained,
    Event,
    Fenced,
    FinishPush,
    KvMover,
    PushChunk,
    PushComplete,
    PushFailed,
)
from disagg.transfer.slow import NUM_WRITES
from support.clock import FakeClock
from support.transfer import Pool, make_hello, make_layout, make_pool

KEY = ("t", 1)


class Worker:
    """All ranks of one worker on one fabric."""

    def __init__(
        self,
        fabric: MemoryFabric,
        clock: FakeClock,
        worker_id: str,
        uuid: str,
        layout: KvLayout,
        seed: int | None,
    ) -> None:
        self.uuid = uuid
        self.pools: list[Pool] = [
            make_pool(layout, seed=None if seed is None else seed + rank) for rank in range(layout.tp_size)
        ]
        self.transports = [
            MemoryTransport(fabric, uuid=uuid, rank=rank, pool=PoolMemory.of_array(pool))
            for rank, pool in enumerate(self.pools)
        ]
        self.movers = [KvMover(t, layout, rank, clock) for rank, t in enumerate(self.transports)]
        self.hello = make_hello(worker_id, uuid, layout, list(self.transports))

    @property
    def mover(self) -> KvMover:
        return self.movers[0]


MakeWorker = Callable[..., Worker]


@pytest.fixture
def clock() -> FakeClock:
    return FakeClock()


@pytest.fixture
def fabric() -> MemoryFabric:
    return MemoryFabric(hold_writes=True)


@pytest.fixture
def make_worker(fabric: MemoryFabric, clock: FakeClock) -> MakeWorker:
    def make(
        uuid: str, *, worker_id: str | None = None, layout: KvLayout | None = None, seed: int | None = None
    ) -> Worker:
        return Worker(fabric, clock, worker_id or uuid, uuid, layout or make_layout(), seed)

    return make


@pytest.fixture
def prefill(make_worker: MakeWorker) -> Worker:
    return make_worker("p", seed=7)


@pytest.fixture
def decode(make_worker: MakeWorker) -> Worker:
    return make_worker("d")


@pytest.fixture
def mover(prefill: Worker, decode: Worker) -> KvMover:
    assert prefill.mover.on_command(Connect(decode.hello)) == [Connected("d")]
    return prefill.mover


def chunk(
    source: list[int], target: list[int], key: tuple[str, int] = KEY, deadline: float = 1060.0
) -> PushChunk:
    return PushChunk(key, "d", source, target, deadline)


def finish(key: tuple[str, int] = KEY) -> FinishPush:
    return FinishPush(key, token_id=42, position=3, finished=False)


def settle(mover: KvMover, fabric: MemoryFabric) -> list[Event]:
    while fabric.writes:
        fabric.land()
    return mover.poll()


def test_the_time_between_two_chunks_is_not_transfer(
    mover: KvMover, fabric: MemoryFabric, clock: FakeClock
) -> None:
    mover.on_command(chunk([1], [5]))
    clock.advance(0.25)
    assert settle(mover, fabric) == []
    clock.advance(8.0)  # the next chunk is computed
    mover.on_command(chunk([2], [6]))
    mover.on_command(finish())
    clock.advance(0.5)
    (complete,) = settle(mover, fabric)
    assert isinstance(complete, PushComplete)
    assert complete.seconds == 0.75


@pytest.mark.parametrize(("memory", "num_warnings"), [("VRAM", 1), ("DRAM", 0)])
def test_a_slow_way_into_gpu_memory_is_said_once_with_its_cause(
    make_worker: MakeWorker,
    fabric: MemoryFabric,
    clock: FakeClock,
    caplog: pytest.LogCaptureFixture,
    memory: str,
    num_warnings: int,
) -> None:
    """UCX falls back without a word; in host memory there is no faster way to fall from."""
    layout = make_layout(num_layers=12, page_size=16, head_dim=64)
    prefill, decode = make_worker("p", layout=layout), make_worker("d", layout=layout)
    ranks = [msgspec.structs.replace(rank, memory=memory) for rank in decode.hello.ranks]
    prefill.mover.on_command(Connect(msgspec.structs.replace(decode.hello, ranks=ranks)))
    pages = list(range(16))
    for _ in range(3 * NUM_WRITES):
        prefill.mover.on_command(chunk(pages, pages))
        clock.advance(1.0)
        settle(prefill.mover, fabric)
    told = [record.message for record in caplog.records if "fallen back" in record.message]
    assert len(told) == num_warnings
    assert all("KV goes to d by memory at 0.0 GB/s" in line and "RDMA" in line for line in told)


def test_push_of_two_chunks_lands_notifies_and_completes(
    prefill: Worker, decode: Worker, mover: KvMover, fabric: MemoryFabric, clock: FakeClock
) -> None:
    assert mover.on_command(chunk([1, 2], [5, 6])) == []
    clock.advance(0.5)
    mover.on_command(chunk([9], [0]))
    mover.on_command(finish())
    clock.advance(0.25)
    num_bytes = 3 * prefill.pools[0].shape[1]
    assert settle(mover, fabric) == [
        PushComplete(KEY, num_pages=3, num_bytes=num_bytes, seconds=0.75, transport="memory")
    ]
    np.testing.assert_array_equal(decode.pools[0][[5, 6, 0]], prefill.pools[0][[1, 2, 9]])
    done = PushDone("t", 1, 0, 0, num_bytes, token_id=42, position=3, finished=False, transport="memory")
    assert decode.mover.poll() == [Arrived("p", done)]
    assert mover.num_pushes == 0


def test_notification_waits_for_every_write(decode: Worker, mover: KvMover, fabric: MemoryFabric) -> None:
    """Transfers have no order among themselves: the last chunk may land first."""
    for page in range(3):
        mover.on_command(chunk([page], [page]))
    mover.on_command(finish())
    for index in (2, 1):
        fabric.land(index)
        assert mover.poll() == []
        assert decode.mover.poll() == []
    fabric.land()
    assert isinstance(mover.poll()[0], PushComplete)
    assert isinstance(decode.mover.poll()[0], Arrived)


def test_writes_that_landed_before_the_finish_complete_at_the_finish(
    mover: KvMover, fabric: MemoryFabric
) -> None:
    mover.on_command(chunk([0], [0]))
    assert settle(mover, fabric) == []
    assert isinstance(mover.on_command(finish())[0], PushComplete)


def test_push_without_pages_still_notifies(decode: Worker, mover: KvMover) -> None:
    """Decode may hold every page already; it still needs the first token."""
    mover.on_command(chunk([], []))
    assert mover.on_command(finish()) == [PushComplete(KEY, 0, 0, 0.0, "memory")]
    [arrived] = decode.mover.poll()
    assert isinstance(arrived, Arrived)
    assert arrived.done.num_bytes == 0


@pytest.mark.parametrize(("source_tp", "target_tp"), [(1, 2), (2, 1), (2, 2), (3, 1), (1, 3), (2, 3), (3, 2)])
def test_every_overlapping_pair_is_notified_and_no_other(
    make_worker: MakeWorker, fabric: MemoryFabric, source_tp: int, target_tp: int
) -> None:
    source = make_worker("p", layout=make_layout(tp_size=source_tp), seed=3)
    target = make_worker("d", layout=make_layout(tp_size=target_tp))
    for mover in source.movers:
        mover.on_command(Connect(target.hello))
        mover.on_command(chunk([4, 8], [2, 1]))
        mover.on_command(finish())
        assert isinstance(settle(mover, fabric)[-1], PushComplete)
    seen = [
        (event.done.source_rank, event.done.target_rank, event.done.num_bytes)
        for mover in target.movers
        for event in mover.poll()
        if isinstance(event, Arrived)
    ]
    heads_bytes = 2 * source.pools[0].shape[1] * source_tp // 6
    expected = {(1, 2): [3, 3], (2, 1): [3, 3], (2, 2): [3, 3], (3, 1): [2] * 3, (1, 3): [2] * 3}
    shares = expected.get((source_tp, target_tp), [2, 1, 1, 2])
    assert [num_bytes for _, _, num_bytes in sorted(seen)] == [heads * heads_bytes for heads in shares]
    whole_source = np.concatenate([pool.reshape(16, 6 // source_tp, -1) for pool in source.pools], axis=1)
    whole_target = np.concatenate([pool.reshape(16, 6 // target_tp, -1) for pool in target.pools], axis=1)
    np.testing.assert_array_equal(whole_target[[2, 1]], whole_source[[4, 8]])


def test_abort_with_nothing_under_way_fences_at_once(mover: KvMover, fabric: MemoryFabric) -> None:
    mover.on_command(chunk([0], [0]))
    settle(mover, fabric)
    assert mover.on_command(AbortPush(KEY)) == [Fenced(KEY)]
    assert mover.num_pushes == 0


def test_abort_of_an_unknown_attempt_fences_it_for_good(mover: KvMover, fabric: MemoryFabric) -> None:
    """The abort can overtake the engine: a chunk that follows it must not be posted."""
    assert mover.on_command(AbortPush(KEY)) == [Fenced(KEY)]
    assert mover.on_command(chunk([0], [0])) == []
    assert mover.on_command(finish()) == []
    assert not fabric.writes
    assert mover.num_stale == 2


def test_abort_fences_only_when_the_last_write_has_landed(mover: KvMover, fabric: MemoryFabric) -> None:
    mover.on_command(chunk([0], [0]))
    mover.on_command(chunk([1], [1]))
    assert mover.on_command(AbortPush(KEY)) == []
    mover.on_command(chunk([2], [2]))
    assert len(fabric.writes) == 2
    fabric.land()
    assert mover.poll() == []
    fabric.land()
    assert mover.poll() == [Fenced(KEY)]


def test_abort_after_completion_answers_fenced(mover: KvMover, fabric: MemoryFabric) -> None:
    mover.on_command(chunk([0], [0]))
    mover.on_command(finish())
    settle(mover, fabric)
    assert mover.on_command(AbortPush(KEY)) == [Fenced(KEY)]


def test_second_abort_answers_once(mover: KvMover, fabric: MemoryFabric) -> None:
    mover.on_command(chunk([0], [0]))
    assert mover.on_command(AbortPush(KEY)) == []
    assert mover.on_command(AbortPush(KEY)) == []
    assert settle(mover, fabric) == [Fenced(KEY)]


def test_newer_generation_takes_the_place_of_the_older(
    decode: Worker, mover: KvMover, fabric: MemoryFabric
) -> None:
    """A re-push of the same transfer: the old attempt posts no more and notifies nobody."""
    mover.on_command(chunk([0], [0]))
    assert mover.on_command(chunk([0], [3], key=("t", 2))) == []
    mover.on_command(chunk([1], [1]))
    mover.on_command(finish())
    mover.on_command(finish(("t", 2)))
    assert len(fabric.writes) == 2
    events = settle(mover, fabric)
    assert Fenced(KEY) in events
    assert [e.key for e in events if isinstance(e, PushComplete)] == [("t", 2)]
    assert [e.done.generation for e in decode.mover.poll() if isinstance(e, Arrived)] == [2]


def test_other_transfers_are_left_alone_by_a_newer_generation(mover: KvMover, fabric: MemoryFabric) -> None:
    mover.on_command(chunk([0], [0], key=("u", 1)))
    mover.on_command(chunk([0], [3], key=("t", 2)))
    mover.on_command(finish(("u", 1)))
    assert [type(event) for event in settle(mover, fabric)] == [PushComplete]


def test_nothing_is_posted_from_the_deadline_on(
    mover: KvMover, fabric: MemoryFabric, clock: FakeClock
) -> None:
    clock.now = 1060.0
    [failed] = mover.on_command(chunk([0], [0]))
    assert isinstance(failed, PushFailed)
    assert isinstance(failed.error, TransferTimeout)
    assert failed.fenced
    assert not fabric.writes


def test_writes_open_at_the_deadline_fail_the_push_and_fence_it_when_they_end(
    mover: KvMover, fabric: MemoryFabric, clock: FakeClock
) -> None:
    """A peer that hangs keeps a write open for ever; its fence may not be claimed before it ends."""
    mover.on_command(chunk([0], [0]))
    clock.now = 1060.0
    [failed] = mover.poll()
    assert isinstance(failed, PushFailed)
    assert not failed.fenced
    assert mover.wait_s() == STUCK_POLL_S
    clock.advance(1000.0)
    assert mover.poll() == []
    fabric.land()
    assert mover.poll() == [Fenced(KEY)]
    assert mover.wait_s() is None


def test_push_that_is_never_finished_ends_at_its_deadline(
    mover: KvMover, fabric: MemoryFabric, clock: FakeClock
) -> None:
    """Nothing is remembered for ever, even when the engine forgets."""
    mover.on_command(chunk([0], [0]))
    settle(mover, fabric)
    assert mover.wait_s() == 60.0
    clock.now = 1060.0
    assert [type(event) for event in mover.poll()] == [PushFailed]
    assert mover.num_pushes == 0


def test_broken_write_fails_at_once_and_fences_when_it_has_settled(
    mover: KvMover, fabric: MemoryFabric, clock: FakeClock
) -> None:
    """What a broken link had accepted may still arrive, so the fence comes later."""
    mover.on_command(chunk([0], [0]))
    mover.on_command(chunk([1], [1]))
    fabric.fail()
    [failed] = mover.poll()
    assert isinstance(failed, PushFailed)
    assert isinstance(failed.error, LinkLost)
    assert not failed.fenced
    clock.advance(SETTLE_S * 2)
    assert mover.poll() == []
    fabric.land()
    assert mover.poll() == []
    assert mover.wait_s() == SETTLE_S
    clock.advance(SETTLE_S)
    assert mover.poll() == [Fenced(KEY)]
    assert mover.num_pushes == 0


def test_peer_that_died_fails_the_push(mover: KvMover, fabric: MemoryFabric) -> None:
    fabric.kill("d:0")
    mover.on_command(chunk([0], [0]))
    assert [type(event) for event in mover.poll()] == [PushFailed]


def test_peer_that_dies_before_the_notification_fails_the_push_fenced(
    mover: KvMover, fabric: MemoryFabric
) -> None:
    mover.on_command(chunk([0], [0]))
    fabric.land()
    fabric.kill("d:0")
    mover.poll()
    [failed] = mover.on_command(finish())
    assert isinstance(failed, PushFailed)
    assert failed.fenced


def test_disconnect_fails_what_is_open_to_that_peer(
    mover: KvMover, fabric: MemoryFabric, clock: FakeClock
) -> None:
    mover.on_command(chunk([0], [0]))
    events = mover.on_command(Disconnect("d")) + mover.poll()
    assert [type(event) for event in events] == [PushFailed]
    clock.advance(SETTLE_S)
    assert mover.poll() == [Fenced(KEY)]


def test_restarted_peer_takes_the_place_of_the_old_one(
    make_worker: MakeWorker, prefill: Worker, fabric: MemoryFabric
) -> None:
    """Published engines wedge the survivor here: same worker id, same address, another process."""
    old = make_worker("d", worker_id="decode-0")
    prefill.mover.on_command(Connect(old.hello))
    prefill.mover.on_command(chunk([0], [0]))
    new = make_worker("d2", worker_id="decode-0")
    events = prefill.mover.on_command(Connect(new.hello))
    assert isinstance(events[0], PushFailed)
    assert events[1] == Connected("d2")
    fabric.writes.clear()
    prefill.mover.on_command(PushChunk(("u", 1), "d2", [1], [1], 1060.0))
    prefill.mover.on_command(finish(("u", 1)))
    assert any(isinstance(event, PushComplete) for event in settle(prefill.mover, fabric))
    np.testing.assert_array_equal(new.pools[0][1], prefill.pools[0][1])


def test_chunk_for_an_unknown_peer_fails_fenced(mover: KvMover) -> None:
    [failed] = mover.on_command(PushChunk(KEY, "nobody", [0], [0], 1060.0))
    assert isinstance(failed, PushFailed)
    assert failed.fenced


def test_target_page_outside_the_pool_fails_the_push(mover: KvMover, fabric: MemoryFabric) -> None:
    [failed] = mover.on_command(chunk([0], [16]))
    assert isinstance(failed, PushFailed)
    assert isinstance(failed.error, TransferError)
    assert "target page 16" in str(failed.error)
    assert not fabric.writes


def test_peer_with_another_layout_is_refused_by_name(make_worker: MakeWorker, prefill: Worker) -> None:
    other = make_worker("d", layout=make_layout(head_dim=16))
    [failed] = prefill.mover.on_command(Connect(other.hello))
    assert isinstance(failed, ConnectFailed)
    assert isinstance(failed.error, LayoutMismatch)
    assert "head_dim is 8" in str(failed.error)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda hello: {"ranks": []}, "ranks are"),
        (lambda hello: {"ranks": [_changed(hello.ranks[0], page_bytes=1)]}, "page_bytes of rank 0 is 1"),
    ],
)
def test_hello_that_contradicts_itself_is_refused(
    decode: Worker, prefill: Worker, change: Callable[[PeerHello], dict[str, object]], words: str
) -> None:
    [failed] = prefill.mover.on_command(Connect(_changed(decode.hello, **change(decode.hello))))
    assert isinstance(failed, ConnectFailed)
    assert isinstance(failed.error, LayoutMismatch)
    assert words in str(failed.error)


def _changed(record: object, **changes: object) -> object:
    fields = {name: getattr(record, name) for name in record.__struct_fields__}  # type: ignore[attr-defined]
    return type(record)(**(fields | changes))


@pytest.mark.parametrize(
    "payload",
    [
        b"",
        b"\xc1",
        encode(
            PushDone(
                "t", 1, source_rank=1, target_rank=0, num_bytes=1, token_id=0, position=0, finished=False
            )
        ),
        encode(
            PushDone(
                "t", 1, source_rank=0, target_rank=5, num_bytes=1, token_id=0, position=0, finished=False
            )
        ),
    ],
)
def test_malformed_notification_is_dropped_and_counted(
    prefill: Worker, decode: Worker, mover: KvMover, payload: bytes
) -> None:
    """Also one whose sender is another rank than it says, or that is meant for another."""
    prefill.transports[0].notify("d", 0, payload)
    assert decode.mover.poll() == []
    assert decode.mover.num_malformed == 1


def test_drain_ends_after_its_time(mover: KvMover, clock: FakeClock) -> None:
    assert mover.on_command(Drain("x")) == []
    assert mover.wait_s() == AWAIT_POLL_S
    assert mover.poll() == []
    clock.advance(DRAIN_S)
    assert mover.poll() == [Drained("x")]
    assert mover.wait_s() is None


def test_pace_follows_what_is_open(
    mover: KvMover, decode: Worker, fabric: MemoryFabric, clock: FakeClock
) -> None:
    """Tight with open writes, twice a millisecond while KV is awaited, else not at all."""
    assert mover.wait_s() is None
    mover.on_command(chunk([0], [0]))
    assert mover.wait_s() == 0.0
    mover.on_command(finish())
    settle(mover, fabric)
    assert mover.wait_s() == AWAIT_POLL_S
    clock.advance(NOTIFY_LINGER_S)
    assert mover.wait_s() is None
    decode.mover.on_command(AwaitKv(+1))
    assert decode.mover.wait_s() == AWAIT_POLL_S
    decode.mover.on_command(AwaitKv(-1))
    assert decode.mover.wait_s() is None


def test_ended_attempts_are_remembered_within_bounds(mover: KvMover) -> None:
    for number in range(MAX_CLOSED + 10):
        mover.on_command(AbortPush((str(number), 1)))
    assert len(mover._closed) == MAX_CLOSED
