from collections.abc import Iterator

import pytest

from disagg.errors import LinkLost
from disagg.transfer.base import PoolMemory, Transport
from disagg.transfer.memory import MemoryFabric, MemoryTransport
from support.transfer import MakeTransport, Pool, ended, make_hello, make_layout, make_pool, write_of
from support.transport_contract import TransportContract

LAYOUT = make_layout()


@pytest.fixture
def fabric() -> MemoryFabric:
    return MemoryFabric()


@pytest.fixture
def make_transport(fabric: MemoryFabric) -> Iterator[MakeTransport]:
    made: list[Transport] = []

    def make(uuid: str, rank: int, pool: Pool) -> Transport:
        made.append(MemoryTransport(fabric, uuid=uuid, rank=rank, pool=PoolMemory.of_array(pool)))
        return made[-1]

    yield make
    for transport in made:
        transport.close()
    assert not fabric.transports


class TestMemoryTransport(TransportContract):
    """The fake keeps the contract that NIXL keeps."""


def test_a_held_write_may_land_after_its_sender_has_given_up(
    fabric: MemoryFabric, make_transport: MakeTransport
) -> None:
    """Which is what fencing is for, so the fake must be able to do it."""
    source_pool, target_pool = make_pool(LAYOUT, seed=1), make_pool(LAYOUT)
    source, target = make_transport("source", 0, source_pool), make_transport("target", 0, target_pool)
    source.connect(make_hello("decode-0", "target", LAYOUT, [target]))
    fabric.hold_writes = True
    source.post(write_of(LAYOUT, "target", [1], [2]))
    source.disconnect("target")
    [end] = ended(source.poll())
    assert isinstance(end.error, LinkLost)
    assert not target_pool.any()
    fabric.land()
    assert (target_pool[2] == source_pool[1]).all()
    assert source.poll() == []
