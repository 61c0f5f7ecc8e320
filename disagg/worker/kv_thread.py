"""One rank's transfer thread, over the pool of a loaded rank."""

from collections.abc import Callable
from functools import partial

from disagg.config import TransportBackend
from disagg.engine.build import Rank
from disagg.transfer import Event, PoolMemory, TransferThread, make_transport

TRANSPORT = "nixl"
"""What every worker speaks, whatever carries the pages of a pair."""


def make_transfer_thread(
    rank: Rank,
    uuid: str,
    number: int,
    backend: TransportBackend,
    *,
    on_event: Callable[[Event], None],
    on_crash: Callable[[Exception], None],
) -> TransferThread:
    """Prepare the thread of rank `number`; `start` it to learn how peers reach its pool."""
    return TransferThread(
        partial(make_transport, backend, uuid=uuid, rank=number, pool=PoolMemory.of_tensor(rank.pool)),
        rank.layout,
        number,
        on_event,
        on_crash,
    )
