"""The seam between moving KV and what carries it.

A `Transport` belongs to one rank and one thread: it writes runs of that rank's pool into pools of
peers and carries small notifications. It never blocks and starts no thread; `poll` makes it
progress. Addresses are computed here from page ids, base address and page bytes, never received.
"""

from dataclasses import dataclass
from typing import Any, NewType, Protocol

from disagg.errors import TransferError
from disagg.protocol import PeerHello, RankEndpoint
from disagg.transfer.plan import ByteRuns

WriteId = NewType("WriteId", int)


@dataclass(frozen=True, slots=True)
class PoolMemory:
    """One rank's KV pool as the transport sees it."""

    address: int
    num_pages: int
    page_bytes: int
    memory: str = "DRAM"
    """`DRAM` or `VRAM`."""
    device_id: int = 0
    owner: Any = None
    """Keeps the memory alive while it is registered."""

    @property
    def num_bytes(self) -> int:
        """Size of the pool."""
        return self.num_pages * self.page_bytes

    @classmethod
    def of_tensor(cls, pool: Any) -> "PoolMemory":
        """Describe a contiguous torch tensor whose first axis is the page."""
        on_gpu = pool.device.type != "cpu"
        return cls(
            address=pool.data_ptr(),
            num_pages=pool.shape[0],
            page_bytes=pool[0].numel() * pool.element_size(),
            memory="VRAM" if on_gpu else "DRAM",
            device_id=(pool.device.index or 0) if on_gpu else 0,
            owner=pool,
        )

    @classmethod
    def of_array(cls, pool: Any) -> "PoolMemory":
        """Describe a contiguous numpy array whose first axis is the page."""
        return cls(pool.ctypes.data, pool.shape[0], pool.nbytes // pool.shape[0], owner=pool)


@dataclass(frozen=True, slots=True)
class Write:
    """Copy runs of this rank's pool into one rank's pool of a peer."""

    peer_uuid: str
    target_rank: int
    runs: ByteRuns


@dataclass(frozen=True, slots=True)
class WriteEnded:
    """A posted write is over. `error` is None when its bytes are at the receiver, in full."""

    write_id: WriteId
    error: TransferError | None


@dataclass(frozen=True, slots=True)
class Notified:
    """A peer's rank sent a notification; `payload` is unchecked."""

    agent_name: str
    payload: bytes


TransportEvent = WriteEnded | Notified


class Transport(Protocol):
    """Carries one rank's KV. Used by one thread only; every failure is a `WorkerError` of ours."""

    name: str

    def endpoint(self) -> RankEndpoint:
        """Say how peers reach this rank's pool; goes into the worker's PeerHello."""

    def carrier(self, peer_uuid: str) -> str:
        """Name what carries writes to a connected peer."""

    def connect(self, peer: PeerHello) -> None:
        """Learn how to reach every rank of a peer. A second call with the same uuid does nothing.

        Raises:
            TransferError: the peer's metadata is not what its hello says.
        """

    def disconnect(self, peer_uuid: str) -> None:
        """Forget a peer. Its open writes end with LinkLost at the next poll, or once they have landed.

        Idempotent. LinkLost is no fence: bytes already handed to the network may still land for a moment.
        """

    def post(self, write: Write) -> WriteId:
        """Start a write; `poll` tells its end, also where it breaks at once.

        Raises:
            LinkLost: the peer is unknown or cannot be reached; nothing of the write was sent.
            TransferError: the write was refused and nothing of it was sent.
        """

    def notify(self, peer_uuid: str, target_rank: int, payload: bytes) -> None:
        """Send a small message. Ordered after nothing: send it once the writes have ended.

        Raises:
            LinkLost: the peer is unknown or its link is broken.
        """

    def poll(self) -> list[TransportEvent]:
        """Progress and return what has happened. Never blocks."""

    def close(self) -> None:
        """Give up peers and the registration of the pool. The object is useless afterwards."""


def agent_name(uuid: str, rank: int) -> str:
    """Name one rank's transfer agent; a restarted process has another uuid, hence another name."""
    return f"{uuid}:{rank}"


def split_agent_name(name: str) -> tuple[str, int] | None:
    """Undo `agent_name`; None for a name that it did not make."""
    uuid, separator, rank = name.rpartition(":")
    return (uuid, int(rank)) if separator and uuid and rank.isdecimal() else None
