import logging
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import msgspec
import numpy as np
import pytest

from disagg.errors import ConfigError, LinkLost, TransferError
from disagg.protocol import PeerHello
from disagg.transfer import PoolMemory, make_transport
from disagg.transfer.base import Transport, Write
from disagg.transfer.cuda_ipc import CudaIpcTransport, why_not_mapped
from disagg.transfer.memory import MemoryFabric, MemoryTransport
from disagg.transfer.plan import ByteRuns
from support.copier import FakeCopier
from support.transfer import (
    MakeTransport,
    Pool,
    ended,
    make_hello,
    make_layout,
    make_pool,
    notified,
    write_of,
)
from support.transport_contract import TransportContract

LAYOUT = make_layout()
HOST = "boot/1"


def memory_of(pool: Pool) -> PoolMemory:
    """Pretend that an array is on a GPU."""
    return PoolMemory(pool.ctypes.data, *pool.shape, memory="VRAM", owner=pool)


@pytest.fixture
def fabric() -> MemoryFabric:
    return MemoryFabric()


@pytest.fixture
def copier() -> FakeCopier:
    """The GPU, to all transports of a test."""
    return FakeCopier()


@pytest.fixture
def make(fabric: MemoryFabric, copier: FakeCopier) -> Iterator[Callable[..., CudaIpcTransport]]:
    made: list[Transport] = []

    def make_one(uuid: str, rank: int, pool: Pool, host_id: str = HOST, **options: bool) -> CudaIpcTransport:
        memory = memory_of(pool)
        below = MemoryTransport(fabric, uuid=uuid, rank=rank, pool=memory)
        transport = CudaIpcTransport(below, copier, pool=memory, host_id=host_id, **options)
        made.append(transport)
        return transport

    yield make_one
    for transport in made:
        transport.close()
    assert not copier.opened, "every pool is unmapped"
    assert not fabric.transports


@pytest.fixture
def make_transport_here(make: Callable[..., CudaIpcTransport]) -> MakeTransport:
    return make


class TestCudaIpcTransport(TransportContract):
    """It keeps the contract that NIXL keeps."""

    memory = "VRAM"

    @pytest.fixture
    def make_transport(self, make_transport_here: MakeTransport) -> MakeTransport:
        return make_transport_here


@dataclass
class Pair:
    source: CudaIpcTransport
    hello: PeerHello
    source_pool: Pool = field(default_factory=lambda: make_pool(LAYOUT, seed=1))
    target_pool: Pool = field(default_factory=lambda: make_pool(LAYOUT))


@pytest.fixture
def pair(make: Callable[..., CudaIpcTransport]) -> Pair:
    source_pool, target_pool = make_pool(LAYOUT, seed=1), make_pool(LAYOUT)
    source, target = make("source", 0, source_pool), make("target", 0, target_pool)
    return Pair(source, make_hello("decode-0", "target", LAYOUT, [target]), source_pool, target_pool)


def test_pages_go_by_the_copier_and_notifications_below(
    pair: Pair, fabric: MemoryFabric, copier: FakeCopier
) -> None:
    fabric.hold_writes = True
    pair.source.connect(pair.hello)
    assert pair.source.carrier("target") == "cuda_ipc"
    pair.source.post(write_of(LAYOUT, "target", [3], [4]))
    assert (len(copier.copies), len(fabric.writes)) == (1, 0)
    np.testing.assert_array_equal(pair.target_pool[4], pair.source_pool[3])


def test_a_write_has_ended_only_when_its_copy_has(pair: Pair, copier: FakeCopier) -> None:
    """The notification follows, and decode reads the page."""
    copier.hold = True
    pair.source.connect(pair.hello)
    first = pair.source.post(write_of(LAYOUT, "target", [1], [1]))
    second = pair.source.post(write_of(LAYOUT, "target", [2], [2]))
    assert pair.source.poll() == []
    copier.land()
    assert [end.write_id for end in ended(pair.source.poll())] == [first]
    copier.land()
    assert [end.write_id for end in ended(pair.source.poll())] == [second]


def test_a_forgotten_peer_stays_mapped_until_the_last_copy_has_ended(pair: Pair, copier: FakeCopier) -> None:
    """To unmap under a copy kills the process that copies; its end is the fence, in full."""
    copier.hold = True
    pair.source.connect(pair.hello)
    pair.source.post(write_of(LAYOUT, "target", [1], [1]))
    pair.source.disconnect("target")
    assert ended(pair.source.poll()) == []
    assert len(copier.opened) == 1
    copier.land()
    [end] = ended(pair.source.poll())
    assert end.error is None
    assert copier.opened == []


def test_an_idle_peer_is_unmapped_at_once(pair: Pair, copier: FakeCopier) -> None:
    """Its memory is the GPU's again only then, and its successor needs it."""
    pair.source.connect(pair.hello)
    assert len(copier.opened) == 1
    pair.source.disconnect("target")
    assert copier.opened == []


def test_a_peer_that_comes_back_under_a_copy_is_mapped_again(pair: Pair, copier: FakeCopier) -> None:
    copier.hold = True
    pair.source.connect(pair.hello)
    pair.source.post(write_of(LAYOUT, "target", [1], [1]))
    pair.source.disconnect("target")
    pair.source.connect(pair.hello)
    copier.land()
    pair.source.poll()
    assert len(copier.opened) == 1


def test_a_peer_that_cannot_be_mapped_is_written_to_below(
    pair: Pair, copier: FakeCopier, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    copier.fails = "cudaErrorPeerAccessUnsupported: no"
    pair.source.connect(pair.hello)
    assert "decode-0 by memory, because CUDA does not map the pool of its rank 0: cudaErr" in caplog.text
    assert pair.source.carrier("target") == "memory"
    write_id = pair.source.post(write_of(LAYOUT, "target", [5], [6]))
    assert [(end.write_id, end.error) for end in ended(pair.source.poll())] == [(write_id, None)]
    np.testing.assert_array_equal(pair.target_pool[6], pair.source_pool[5])
    assert not copier.copies


def test_ids_of_both_ways_are_not_confused(
    make: Callable[..., CudaIpcTransport], pair: Pair, fabric: MemoryFabric, copier: FakeCopier
) -> None:
    far = make("far", 0, make_pool(LAYOUT), host_id="boot2/1")
    far_hello = make_hello("decode-1", "far", LAYOUT, [far])
    pair.source.connect(pair.hello)
    pair.source.connect(far_hello)
    copier.hold = fabric.hold_writes = True
    ids = [pair.source.post(write_of(LAYOUT, uuid, [1], [1])) for uuid in ("far", "target", "far")]
    assert len(set(ids)) == 3
    fabric.land(1)
    assert [end.write_id for end in ended(pair.source.poll())] == [ids[2]]
    copier.land()
    assert [end.write_id for end in ended(pair.source.poll())] == [ids[1]]
    fabric.land()
    assert [end.write_id for end in ended(pair.source.poll())] == [ids[0]]


def test_required_it_refuses_a_peer_and_says_why(
    make: Callable[..., CudaIpcTransport], pair: Pair, copier: FakeCopier
) -> None:
    strict = make("strict", 0, make_pool(LAYOUT), is_required=True)
    far = make_hello("far-0", "far", LAYOUT, [make("far", 0, make_pool(LAYOUT), host_id="boot2/1")])
    with pytest.raises(TransferError, match="transport_backend is cuda_ipc, but its rank 0 is on another h"):
        strict.connect(far)
    with pytest.raises(LinkLost):
        strict.notify("far", 0, b"")


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"ipc_host": "boot2/1"}, "rank 0 is on another host"),
        ({"ipc_host": "boot/2"}, "rank 0 is in another PID namespace"),
        ({"memory": "DRAM"}, "rank 0 is in host memory"),
        ({"ipc_handle": b""}, "rank 0 exports no pool"),
        ({}, None),
    ],
)
def test_why_a_peer_is_not_mapped(pair: Pair, changes: dict[str, str | bytes], reason: str | None) -> None:
    ranks = [msgspec.structs.replace(rank, **changes) for rank in pair.hello.ranks]
    told = why_not_mapped(HOST, msgspec.structs.replace(pair.hello, ranks=ranks))
    assert told is None if reason is None else told is not None and reason in told


def test_one_rank_that_cannot_be_mapped_leaves_none_mapped(
    make: Callable[..., CudaIpcTransport], copier: FakeCopier
) -> None:
    source = make("source", 0, make_pool(LAYOUT))
    layout = make_layout(tp_size=2)
    ranks = [make("target", rank, make_pool(layout)) for rank in range(2)]
    hello = make_hello("decode-0", "target", layout, list(ranks))
    opened, copier.opened = copier.open, []

    def second_fails(handle: bytes, num_bytes: int) -> int:
        if copier.opened:
            raise RuntimeError("cudaErrorInvalidValue: no")
        return opened(handle, num_bytes)

    source._copier = _With(copier, second_fails)
    source.connect(hello)
    assert (source.carrier("target"), copier.opened) == ("memory", [])


class _With(FakeCopier):
    """Another copier's, with an `open` of its own."""

    def __init__(self, copier: FakeCopier, opens: Callable[[bytes, int], int]) -> None:
        super().__init__(opened=copier.opened)
        self._opens = opens

    def open(self, handle: bytes, num_bytes: int) -> int:
        return self._opens(handle, num_bytes)


@pytest.mark.parametrize(("source", "target"), [(0, 16), (16, 0), (-1, 0)])
def test_bytes_outside_of_a_pool_are_refused(
    pair: Pair, copier: FakeCopier, source: int, target: int
) -> None:
    """Nothing behind this would: a kernel writes wherever it is sent."""
    pair.source.connect(pair.hello)
    page = pair.source_pool.shape[1]
    runs = ByteRuns(*(np.array([n], np.int64) for n in (source * page, target * page, page)))
    with pytest.raises(TransferError, match="outside of a pool of 49152 bytes"):
        pair.source.post(Write("target", 0, runs))
    assert not copier.copies


def test_a_copy_that_fails_to_start_is_no_refusal(pair: Pair, copier: FakeCopier) -> None:
    """Part of it may be under way, so its end is told, as an error, and its pages are settled."""
    pair.source.connect(pair.hello)
    copier.fails = "cudaErrorLaunchFailure: words"
    write_id = pair.source.post(write_of(LAYOUT, "target", [1], [1]))
    [end] = ended(pair.source.poll())
    assert end.write_id == write_id
    assert isinstance(end.error, LinkLost)


def test_a_copy_that_fails_ends_in_an_error(pair: Pair, copier: FakeCopier) -> None:
    pair.source.connect(pair.hello)
    pair.source.post(write_of(LAYOUT, "target", [1], [1]))
    copier.fails = "cudaErrorIllegalAddress: words"
    [end] = ended(pair.source.poll())
    assert isinstance(end.error, LinkLost)
    assert "words" in str(end.error)


def test_notifications_pass_through(pair: Pair, make: Callable[..., CudaIpcTransport]) -> None:
    back = make("back", 0, make_pool(LAYOUT))
    back.connect(pair.hello)
    pair.source.connect(make_hello("back-0", "back", LAYOUT, [back]))
    pair.source.notify("back", 0, b"words")
    assert [n.payload for n in notified(back.poll())] == [b"words"]


def test_a_pool_that_cannot_be_exported_is_told(fabric: MemoryFabric) -> None:
    memory = memory_of(make_pool(LAYOUT))
    below = MemoryTransport(fabric, uuid="u", rank=0, pool=memory)
    with pytest.raises(TransferError, match="CUDA exports no pool: words"):
        CudaIpcTransport(below, FakeCopier(fails="words"), pool=memory, host_id=HOST)


def test_required_without_a_gpu_it_is_refused_at_the_start() -> None:
    pool = PoolMemory.of_array(make_pool(LAYOUT))
    with pytest.raises(ConfigError, match="transport_backend is cuda_ipc, but the pool is in host memory"):
        make_transport("cuda_ipc", uuid="u", rank=0, pool=pool)
