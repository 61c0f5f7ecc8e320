"""A transport inside one process: for tests, with faults on demand.

Keeps the contract of `base.Transport` and passes the same tests as NIXL. A `MemoryFabric` is the
wire: by default a write lands at the sender's next poll; with `hold_writes` it lands when told,
in any order, also after its sender has disconnected.
"""

import ctypes
from dataclasses import dataclass, field

from disagg.errors import LinkLost, TransferError
from disagg.protocol import PeerHello, RankEndpoint
from disagg.transfer.base import (
    Notified,
    PoolMemory,
    TransportEvent,
    Write,
    WriteEnded,
    WriteId,
    agent_name,
)


@dataclass(slots=True)
class FabricWrite:
    """A write under way: `land` copies its bytes, `ended` is what its sender is told."""

    sender: "MemoryTransport"
    write_id: WriteId
    source: PoolMemory
    target: PoolMemory
    write: Write

    def land(self) -> None:
        """Copy the bytes now."""
        runs = self.write.runs
        for source, target, length in zip(
            runs.source_offsets.tolist(), runs.target_offsets.tolist(), runs.lengths.tolist(), strict=True
        ):
            ctypes.memmove(self.target.address + target, self.source.address + source, length)


@dataclass(slots=True)
class MemoryFabric:
    """The wire between the memory transports of one test. Not thread-safe with `hold_writes`."""

    hold_writes: bool = False
    transports: dict[str, "MemoryTransport"] = field(default_factory=dict)
    writes: list[FabricWrite] = field(default_factory=list)
    """Held writes, oldest first."""

    def land(self, index: int = 0) -> None:
        """Let one held write land and its sender know."""
        write = self.writes.pop(index)
        write.land()
        write.sender.on_ended(write.write_id, None)

    def fail(self, index: int = 0) -> None:
        """End one held write in an error without its bytes."""
        write = self.writes.pop(index)
        write.sender.on_ended(write.write_id, LinkLost("the link broke"))

    def kill(self, name: str) -> None:
        """Take one agent away as kill -9 does: writes to it fail."""
        self.transports.pop(name, None)


class MemoryTransport:
    """One rank's end of a `MemoryFabric`."""

    name = "memory"

    def __init__(self, fabric: MemoryFabric, *, uuid: str, rank: int, pool: PoolMemory) -> None:
        self._fabric = fabric
        self._agent_name = agent_name(uuid, rank)
        self._rank = rank
        self._pool = pool
        self._peers: dict[str, PeerHello] = {}
        self._open: dict[WriteId, str] = {}
        self._events: list[TransportEvent] = []
        self._next_id = 0
        fabric.transports[self._agent_name] = self

    def endpoint(self) -> RankEndpoint:
        """Say how peers reach this rank's pool."""
        return RankEndpoint(
            rank=self._rank,
            agent_name=self._agent_name,
            agent_metadata=self._agent_name.encode(),
            base_address=self._pool.address,
            num_pages=self._pool.num_pages,
            page_bytes=self._pool.page_bytes,
            memory=self._pool.memory,
            device_id=self._pool.device_id,
        )

    def carrier(self, peer_uuid: str) -> str:
        """Name what carries writes to a peer."""
        return self.name

    def connect(self, peer: PeerHello) -> None:
        """Learn how to reach every rank of a peer."""
        for endpoint in peer.ranks:
            if endpoint.agent_name != agent_name(peer.uuid, endpoint.rank):
                raise TransferError(f"agent {endpoint.agent_name} is not rank {endpoint.rank} of {peer.uuid}")
            if endpoint.agent_metadata != endpoint.agent_name.encode():
                raise TransferError(f"metadata of {endpoint.agent_name} belongs to another agent")
        self._peers.setdefault(peer.uuid, peer)

    def disconnect(self, peer_uuid: str) -> None:
        """Forget a peer; its open writes end with LinkLost, and may still land."""
        self._peers.pop(peer_uuid, None)
        for write_id in [i for i, uuid in self._open.items() if uuid == peer_uuid]:
            self.on_ended(write_id, LinkLost(f"peer {peer_uuid} was disconnected"))

    def post(self, write: Write) -> WriteId:
        """Start a write."""
        target = self._target(write.peer_uuid, write.target_rank)
        write_id = WriteId(self._next_id)
        self._next_id += 1
        self._open[write_id] = write.peer_uuid
        if target is None:
            self.on_ended(write_id, LinkLost(f"peer {write.peer_uuid} is gone"))
            return write_id
        under_way = FabricWrite(self, write_id, self._pool, target._pool, write)
        self._fabric.writes.append(under_way)
        if not self._fabric.hold_writes:
            self._fabric.land(self._fabric.writes.index(under_way))
        return write_id

    def notify(self, peer_uuid: str, target_rank: int, payload: bytes) -> None:
        """Send a small message to one rank of a peer."""
        target = self._target(peer_uuid, target_rank)
        if target is None:
            raise LinkLost(f"peer {peer_uuid} is gone")
        target._events.append(Notified(self._agent_name, payload))

    def poll(self) -> list[TransportEvent]:
        """Return what has happened since the last call."""
        events, self._events = self._events, []
        return events

    def close(self) -> None:
        """Leave the fabric."""
        for peer_uuid in list(self._peers):
            self.disconnect(peer_uuid)
        self._fabric.transports.pop(self._agent_name, None)

    def on_ended(self, write_id: WriteId, error: TransferError | None) -> None:
        """Record the end of a write, once."""
        if self._open.pop(write_id, None) is not None:
            self._events.append(WriteEnded(write_id, error))

    def _target(self, peer_uuid: str, rank: int) -> "MemoryTransport | None":
        peer = self._peers.get(peer_uuid)
        if peer is None:
            raise LinkLost(f"peer {peer_uuid} is not connected")
        if not 0 <= rank < len(peer.ranks):
            raise TransferError(f"peer {peer_uuid} has no rank {rank}")
        return self._fabric.transports.get(agent_name(peer_uuid, rank))
