"""The NCCL transport keeps the contract, with sockets between its pairs where NCCL would need GPUs."""

import os
import threading
import time
from collections.abc import Iterator

import msgspec
import numpy as np
import pytest

from disagg.errors import LinkLost, TransferError
from disagg.transfer import host_id, nccl, prepare_environment, process_start_time
from disagg.transfer import make_transport as make_named_transport
from disagg.transfer.base import PoolMemory, Transport, WriteId
from disagg.transfer.nccl import Announce, NcclTransport, Runs, Watch
from support.socket_wire import SocketWire, new_id
from support.system import eventually
from support.transfer import (
    MakeTransport,
    Pool,
    ended,
    make_hello,
    make_layout,
    make_pool,
    notified,
    poll_until,
    write_of,
)
from support.transport_contract import TransportContract

prepare_environment()
LAYOUT = make_layout()


@pytest.fixture
def make_transport(monkeypatch: pytest.MonkeyPatch) -> Iterator[MakeTransport]:
    # Less than the wait for threads below: an end whose other end has been given up waits so long.
    monkeypatch.setattr("support.socket_wire.MEET_S", 3.0)
    made: list[Transport] = []

    def make(uuid: str, rank: int, pool: Pool) -> Transport:
        memory = PoolMemory.of_array(pool)
        nixl = make_named_transport("nixl", uuid=uuid, rank=rank, pool=memory)
        made.append(NcclTransport(nixl, memory, make_wire=SocketWire, make_id=new_id))
        return made[-1]

    yield make
    for transport in made:
        transport.close()
    eventually(lambda: not threads(), "every thread of a pair has ended", within_s=20.0)


def threads() -> list[str]:
    return [thread.name for thread in threading.enumerate() if thread.name.startswith("kv-nccl")]


class TestNcclTransport(TransportContract):
    """The same tests as NIXL's."""


class Two:
    """A source and a target, connected."""

    def __init__(self, make_transport: MakeTransport) -> None:
        self.source_pool, self.target_pool = make_pool(LAYOUT, seed=1), make_pool(LAYOUT)
        source = make_transport("source", 0, self.source_pool)
        target = make_transport("target", 0, self.target_pool)
        assert isinstance(source, NcclTransport)
        assert isinstance(target, NcclTransport)
        self.source, self.target = source, target
        self.hello = make_hello("decode-0", "target", LAYOUT, [target])
        source.connect(self.hello)

    def post(self, page: int) -> WriteId:
        return self.source.post(write_of(LAYOUT, "target", [page], [page]))

    def end_of(self, write_id: WriteId, limit_s: float = 10.0) -> TransferError | None:
        poll = lambda e: any(end.write_id == write_id for end in ended(e))  # noqa: E731
        events = ended(poll_until(poll, self.source, self.target, limit_s=limit_s))
        assert [end.write_id for end in events] == [write_id]
        return events[0].error


@pytest.fixture
def two(make_transport: MakeTransport) -> Two:
    return Two(make_transport)


def test_a_pair_is_made_once_and_keeps_the_order(two: Two) -> None:
    for page in range(4):
        assert two.end_of(two.post(page)) is None
    assert sorted(threads()) == ["kv-nccl-0", "kv-nccl-1"]
    ids = [two.post(page) for page in range(4, 12)]
    events = poll_until(lambda e: len(ended(e)) == 8, two.source, two.target)
    assert [e.write_id for e in ended(events)] == ids
    np.testing.assert_array_equal(two.target_pool[:12], two.source_pool[:12])


def test_announcements_that_overtake_each_other_are_put_in_order(two: Two) -> None:
    """Notifications have no promised order; the bytes of a pair have one, on both sides."""
    held: list[tuple[str, bytes]] = []
    deliver = two.source._notifier.notify
    two.source._notifier.notify = lambda uuid, rank, payload: held.append((uuid, payload))  # type: ignore[method-assign]
    ids = [two.post(page) for page in range(3)]
    for uuid, payload in held[::-1]:
        deliver(uuid, 0, payload)
    events = poll_until(lambda e: len(ended(e)) == 3, two.source, two.target)
    assert [(e.write_id, e.error) for e in ended(events)] == [(i, None) for i in ids]
    np.testing.assert_array_equal(two.target_pool[:3], two.source_pool[:3])


def test_a_write_has_ended_only_when_it_has_landed(two: Two) -> None:
    """The sender's side of a send is done when NCCL has taken the bytes, which says nothing of the target."""
    write_id = two.post(5)
    until = time.monotonic() + 0.3
    while time.monotonic() < until:
        assert not ended(two.source.poll())  # the target is not polled: it has not been told
    assert two.end_of(write_id) is None


class Stuck(SocketWire):
    """Meets the other end, and then takes and sends nothing."""

    def receive(self, runs: Runs, watch: Watch) -> None:
        while True:
            watch()
            time.sleep(0.001)


def test_disconnecting_aborts_the_pair_on_both_sides(two: Two) -> None:
    assert two.end_of(two.post(0)) is None
    two.target._make_wire = Stuck
    two.source.disconnect("target")
    eventually(lambda: not [two.target.poll() for _ in threads()], "both ends of the pair have ended")
    two.source.connect(two.hello)
    write_id = two.post(1)
    eventually(lambda: two.source.poll() + two.target.poll() or len(threads()) == 2, "another pair is made")
    two.source.disconnect("target")
    assert isinstance(two.end_of(write_id), LinkLost)
    eventually(lambda: not [two.target.poll() for _ in threads()], "both ends of the pair have ended")


def test_a_target_gives_up_a_source_that_falls_silent(two: Two, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its process may be gone, and nobody polls a target that awaits no KV: the thread sees to it itself."""
    monkeypatch.setattr(nccl, "SILENT_S", 0.2)
    monkeypatch.setattr(nccl, "BEAT_S", 0.02)
    two.target._make_wire = Stuck
    write_id = two.post(1)
    until = time.monotonic() + 0.6
    while time.monotonic() < until:
        assert not two.source.poll()
        two.target.poll()
    assert len(threads()) == 2, "a source that writes for long is not silent"
    eventually(lambda: threads() == ["kv-nccl-0"] or threads() == [], "the target's end has ended")
    assert isinstance(two.end_of(write_id), LinkLost)


@pytest.mark.parametrize("lives", [True, False])
def test_a_source_gives_up_a_target_whose_process_is_gone(
    two: Two, monkeypatch: pytest.MonkeyPatch, lives: bool
) -> None:
    """NCCL may not tell of it, nor UCX, where both go by shared memory."""
    monkeypatch.setattr(nccl, "BEAT_S", 0.02)
    monkeypatch.setattr(nccl, "WRITE_S", 0.5)
    started_at = process_start_time(os.getpid())
    assert started_at is not None
    pids = [(os.getpid(), started_at if lives else started_at + 1)]
    two.target._make_wire = Stuck
    two.source.disconnect("target")
    two.source.connect(msgspec.structs.replace(two.hello, host_id=host_id(), pids=pids))
    words = str(two.end_of(two.post(1)))
    assert ("the process of target:0 is gone" in words) == (not lives), words


def test_a_write_that_does_not_land_in_time_ends(two: Two, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nccl, "WRITE_S", 0.2)
    two.target._make_wire = Stuck
    assert isinstance(two.end_of(two.post(1)), LinkLost)
    two.target._make_wire = SocketWire
    assert two.end_of(two.post(1)) is None, "another pair is made"


def test_a_target_that_does_not_come_is_given_up(two: Two, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nccl, "MEET_S", 0.1)
    monkeypatch.setattr("support.socket_wire.MEET_S", 2.0)
    write_id = two.post(1)
    events = poll_until(lambda e: bool(ended(e)), two.source)
    assert [e.write_id for e in ended(events)] == [write_id]
    assert "the target did not come within 0.1 s" in str(ended(events)[0].error)


def test_an_idle_pair_ends_by_itself_and_the_next_write_makes_another(
    two: Two, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A communicator takes memory of both GPUs, and a target never learns that its source was killed."""
    monkeypatch.setattr(nccl, "IDLE_S", 0.1)
    assert two.end_of(two.post(1)) is None
    eventually(lambda: not threads(), "both ends have ended, polled by nobody")
    assert two.end_of(two.post(2)) is None
    np.testing.assert_array_equal(two.target_pool[1:3], two.source_pool[1:3])


def test_a_source_that_begins_another_pair_has_left_the_old_one(two: Two) -> None:
    """It may have been unable to say so; the target must not keep a communicator for each."""
    assert two.end_of(two.post(1)) is None
    (source,) = two.source._sources.values()
    two.source._sources.clear()
    source.end.stop("lost")
    assert two.end_of(two.post(2)) is None
    eventually(
        lambda: sorted(threads()) == ["kv-nccl-0", "kv-nccl-1"], f"the old pair has ended: {threads()}"
    )


def test_memory_outside_of_the_pool_is_not_written(two: Two) -> None:
    """What a source announces is checked: NIXL's targets are protected by what they registered."""
    size = two.target_pool.nbytes
    for number, (offset, length) in enumerate([(size - 8, 16), (-8, 8), (0, -8), (0, 0), (2**63 - 8, 16)]):
        pair = new_id()
        runs = [np.array([value], np.int64).tobytes() for value in (offset, length)]
        payload = msgspec.msgpack.encode(Announce(pair, 0, *runs))
        two.source.notify("target", 0, payload)
        eventually(
            lambda pair=pair: two.source.poll() + two.target.poll() or pair in two.target._over,
            f"case {number} is refused",
        )
    assert not two.target_pool.any()


def test_what_is_no_message_of_ours_is_passed_on(two: Two) -> None:
    for payload in (b"", b"\xc1", msgspec.msgpack.encode(["push_done", 1])):
        two.source.notify("target", 0, payload)
        events = poll_until(lambda e: bool(notified(e)), two.target, two.source)
        assert [n.payload for n in notified(events)] == [payload]


def test_a_peer_of_another_backend_is_refused(make_transport: MakeTransport) -> None:
    source = make_transport("source", 0, make_pool(LAYOUT))
    memory = PoolMemory.of_array(make_pool(LAYOUT))
    nixl = make_named_transport("nixl", uuid="plain", rank=0, pool=memory)
    with pytest.raises(TransferError, match="plain:0 does not speak nccl; give both workers the same"):
        source.connect(make_hello("decode-0", "plain", LAYOUT, [nixl]))
    nixl.close()


def test_an_error_of_the_library_ends_the_pair_and_not_the_process(
    two: Two, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("support.socket_wire.MEET_S", 0.3)

    def broken(pair: bytes, end: int) -> SocketWire:
        raise RuntimeError("CUDA error: out of memory")

    two.source._make_wire = broken
    error = two.end_of(two.post(1))
    assert isinstance(error, LinkLost)
    assert "out of memory" in str(error)
    two.source._make_wire = SocketWire
    assert two.end_of(two.post(1)) is None


def test_large_writes_are_cut_alike_on_both_sides() -> None:
    runs: Runs = [(i, 1) for i in range(2 * nccl.GROUP_RUNS + 1)]
    batches = nccl._batches(runs)
    assert [len(batch) for batch in batches] == [nccl.GROUP_RUNS, nccl.GROUP_RUNS, 1]
    assert [run for batch in batches for run in batch] == runs
