"""NIXL keeps the contract, and each of its exceptions has one of ours."""

from collections.abc import Iterator

import numpy as np
import pytest

from disagg.errors import TransferError
from disagg.transfer import make_transport as make_named_transport
from disagg.transfer import prepare_environment
from disagg.transfer.base import PoolMemory, Transport
from disagg.transfer.nixl import ERROR_OF, NixlTransport
from support.transfer import (
    MakeTransport,
    Pool,
    ended,
    make_hello,
    make_layout,
    make_pool,
    poll_until,
    write_of,
)
from support.transport_contract import TransportContract

prepare_environment()
LAYOUT = make_layout()


@pytest.fixture
def make_transport() -> Iterator[MakeTransport]:
    made: list[Transport] = []

    def make(uuid: str, rank: int, pool: Pool) -> Transport:
        made.append(make_named_transport("nixl", uuid=uuid, rank=rank, pool=PoolMemory.of_array(pool)))
        return made[-1]

    yield make
    for transport in made:
        transport.close()


class TestNixlTransport(TransportContract):
    """The same tests as the fake's."""


def test_every_exception_of_nixl_has_one_of_ours() -> None:
    """A new one would fly past every `except TransferError` and end the transfer thread."""
    from nixl import _bindings

    theirs = {
        name
        for name, kind in vars(_bindings).items()
        if isinstance(kind, type) and issubclass(kind, BaseException)
    }
    assert theirs == set(ERROR_OF)


def test_a_broken_link_is_opened_again(make_transport: MakeTransport) -> None:
    """NIXL never does so by itself; a peer that lives on must not stay unreachable."""
    source_pool, target_pool = make_pool(LAYOUT, seed=1), make_pool(LAYOUT)
    source, target = make_transport("source", 0, source_pool), make_transport("target", 0, target_pool)
    assert isinstance(source, NixlTransport)
    source.connect(make_hello("decode-0", "target", LAYOUT, [target]))
    # Behind our back, as a link error does.
    source._agent.remove_remote_agent("target:0")
    with pytest.raises(TransferError, match="nixlNotFoundError"):
        source.post(write_of(LAYOUT, "target", [1], [1]))
    source.post(write_of(LAYOUT, "target", [1], [1]))
    events = poll_until(lambda e: bool(ended(e)), source, target)
    assert ended(events)[0].error is None
    np.testing.assert_array_equal(target_pool[1], source_pool[1])


def test_memory_outside_the_peers_pool_is_refused(make_transport: MakeTransport) -> None:
    """The last line of defence, behind the check of page ids."""
    source, target = make_transport("s", 0, make_pool(LAYOUT)), make_transport("t", 0, make_pool(LAYOUT))
    source.connect(make_hello("decode-0", "t", LAYOUT, [target]))
    with pytest.raises(TransferError):
        source.post(write_of(LAYOUT, "t", [0], [99]))
