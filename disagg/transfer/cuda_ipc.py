"""KV between GPUs of one host: one kernel copies pages into the peer's pool, which CUDA IPC maps here.

It stands on another transport, which carries notifications, and writes to every peer whose pools
cannot be mapped. What it promises is more than that one does:

    a write that has ended has landed   the kernel's event has passed; the device's memory is one for all
    a write under way ends by itself    it needs nothing of the peer, so a fence comes within milliseconds
    a peer that dies takes no memory    its pool lives on while it is mapped here and is nobody else's, so
                                        what is still written harms nobody; unmapped, the GPU has it back

The mapping is therefore given up as soon as a peer is forgotten and the last copy into it has ended.
"""

import logging
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
from msgspec.structs import replace
from numpy.typing import NDArray

from disagg.errors import LinkLost, TransferError
from disagg.protocol import PeerHello, RankEndpoint
from disagg.transfer.base import PoolMemory, Transport, TransportEvent, Write, WriteEnded, WriteId
from disagg.transfer.plan import ByteRuns

log = logging.getLogger(__name__)

NAME = "cuda_ipc"
BLOCKS = 32
"""Multiprocessors that copy: 815 GB/s within one H200 and more than NVLink carries, for under a
millisecond of a quarter of them; products that ran beside it took no longer."""


class Copier(Protocol):
    """Maps and copies; `disagg._cuda.PeerCopier`, or a fake. RuntimeError in CUDA's words."""

    def handle(self, address: int) -> tuple[bytes, int]:
        """Make what lets another process map the memory at an address, and how far in that lies."""

    def open(self, handle: bytes, num_bytes: int) -> int:
        """Map what a handle stands for, so large at least; returns its first address."""

    def close(self, base: int) -> None:
        """Unmap it. Every copy into it must have ended."""

    def copy(
        self,
        source: int,
        target: int,
        source_offsets: NDArray[np.int64],
        target_offsets: NDArray[np.int64],
        lengths: NDArray[np.int64],
    ) -> int:
        """Begin to copy runs of bytes; copies end in their order."""

    def is_done(self, copy: int) -> bool:
        """Whether a copy has landed in full."""

    def wait(self) -> None:
        """Wait until no copy is under way."""


@dataclass(slots=True)
class _Mapped:
    """A peer's pools in this process."""

    hello: PeerHello
    bases: list[int] = field(default_factory=list)
    """By rank."""
    num_open: int = 0
    """Copies under way into them."""
    is_forgotten: bool = False


@dataclass(frozen=True, slots=True)
class _Copy:
    write_id: WriteId
    number: int
    peer: _Mapped


class CudaIpcTransport:
    """One rank's copies into the pools of this host, above another transport."""

    name = NAME

    def __init__(
        self,
        below: Transport,
        copier: Copier,
        *,
        pool: PoolMemory,
        host_id: str,
        is_required: bool = False,
    ) -> None:
        """Begin. Takes `below` over.

        Args:
            below: Carries notifications, and writes to peers that cannot be mapped.
            copier: Of the pool's device.
            pool: This rank's; stays where it is.
            host_id: This process's; a peer with another one is not mapped.
            is_required: Refuse such a peer and say why.

        Raises:
            TransferError: the pool cannot be exported.
        """
        self._below = below
        self._copier = copier
        self._pool = pool
        self._host_id = host_id
        self._is_required = is_required
        self._mapped: dict[str, _Mapped] = {}
        self._open: list[_Copy] = []
        """Oldest first; they end in this order."""
        self._written_below: dict[WriteId, WriteId] = {}
        self._ended: list[TransportEvent] = []
        self._next_id = 0
        try:
            self._handle, self._offset = copier.handle(pool.address)
        except RuntimeError as error:
            raise TransferError(f"CUDA exports no pool: {error}") from error

    def endpoint(self) -> RankEndpoint:
        """Say how peers reach this rank's pool, by either way."""
        return replace(
            self._below.endpoint(),
            ipc_handle=self._handle,
            ipc_offset=self._offset,
            ipc_host=self._host_id,
        )

    def carrier(self, peer_uuid: str) -> str:
        """Name what carries writes to a peer."""
        return NAME if peer_uuid in self._mapped else self._below.carrier(peer_uuid)

    def connect(self, peer: PeerHello) -> None:
        """Map the pools of every rank of a peer, or leave it to the transport below and say why."""
        if peer.uuid in self._mapped:
            return
        self._below.connect(peer)
        reason = why_not_mapped(self._host_id, peer)
        if reason is None:
            reason = self._map(peer)
        if reason is None:
            log.info("KV goes to %s by %s", peer.worker_id, NAME)
        elif self._is_required:
            self._below.disconnect(peer.uuid)
            raise TransferError(f"transport_backend is {NAME}, but {reason}")
        else:
            log.info("KV goes to %s by %s, because %s", peer.worker_id, self._below.name, reason)

    def disconnect(self, peer_uuid: str) -> None:
        """Forget a peer. Copies under way into its pools end by themselves, and only then it is unmapped."""
        peer = self._mapped.pop(peer_uuid, None)
        if peer is not None:
            peer.is_forgotten = True
            self._unmap_unused(peer)
        self._below.disconnect(peer_uuid)

    def post(self, write: Write) -> WriteId:
        """Start a write."""
        peer = self._mapped.get(write.peer_uuid)
        if peer is None:
            below = self._below.post(write)
            write_id = self._written_below[below] = self._new_id()
            return write_id
        endpoint = _endpoint_of(peer.hello, write.target_rank)
        # The last line of defence: the kernel would follow them anywhere.
        _check_inside(write.runs.source_offsets, write.runs, self._pool.num_bytes)
        _check_inside(write.runs.target_offsets, write.runs, endpoint.num_pages * endpoint.page_bytes)
        write_id = self._new_id()
        try:
            number = self._copier.copy(
                self._pool.address,
                peer.bases[write.target_rank] + endpoint.ipc_offset,
                write.runs.source_offsets,
                write.runs.target_offsets,
                write.runs.lengths,
            )
        except ValueError as error:
            raise TransferError(str(error)) from error
        except RuntimeError as error:
            # Some of it may be under way: this is no refusal.
            self._ended.append(WriteEnded(write_id, LinkLost(f"the copy did not start: {error}")))
            return write_id
        peer.num_open += 1
        self._open.append(_Copy(write_id, number, peer))
        return write_id

    def notify(self, peer_uuid: str, target_rank: int, payload: bytes) -> None:
        """Send a small message to one rank of a peer."""
        self._below.notify(peer_uuid, target_rank, payload)

    def poll(self) -> list[TransportEvent]:
        """Return ended writes and notifications."""
        self._end_copies()
        for event in self._below.poll():
            if isinstance(event, WriteEnded):
                event = WriteEnded(self._written_below.pop(event.write_id), event.error)
            self._ended.append(event)
        events, self._ended = self._ended, []
        return events

    def close(self) -> None:
        """Wait for copies under way, unmap everything and close the transport below."""
        for peer_uuid in list(self._mapped):
            self.disconnect(peer_uuid)
        try:
            self._copier.wait()
            self._end_copies()
        except RuntimeError as error:
            raise TransferError(f"a copy failed: {error}") from error
        finally:
            self._below.close()

    def _map(self, peer: PeerHello) -> str | None:
        """Map every rank, or none and say why."""
        mapped = _Mapped(peer)
        for endpoint in peer.ranks:
            num_bytes = endpoint.ipc_offset + endpoint.num_pages * endpoint.page_bytes
            try:
                mapped.bases.append(self._copier.open(endpoint.ipc_handle, num_bytes))
            except (RuntimeError, ValueError) as error:
                self._unmap_unused(mapped)
                return f"CUDA does not map the pool of its rank {endpoint.rank}: {error}"
        self._mapped[peer.uuid] = mapped
        return None

    def _unmap_unused(self, peer: _Mapped) -> None:
        if peer.num_open:
            return
        while peer.bases:
            try:
                self._copier.close(peer.bases.pop())
            except RuntimeError:
                log.warning("a pool of %s stays mapped", peer.hello.worker_id, exc_info=True)

    def _end_copies(self) -> None:
        while self._open:
            copy = self._open[0]
            error = None
            try:
                if not self._copier.is_done(copy.number):
                    return
            except RuntimeError as failure:
                error = LinkLost(f"the copy failed: {failure}")
            del self._open[0]
            self._ended.append(WriteEnded(copy.write_id, error))
            copy.peer.num_open -= 1
            if copy.peer.is_forgotten:
                self._unmap_unused(copy.peer)

    def _new_id(self) -> WriteId:
        self._next_id += 1
        return WriteId(self._next_id)


def why_not_mapped(host_id: str, peer: PeerHello) -> str | None:
    """Say why a peer's pools cannot be mapped, as far as its hello tells; None where they may be.

    A handle of CUDA's names the process that made it by its pid, so pids must mean the same here.
    """
    for endpoint in peer.ranks:
        rank = f"its rank {endpoint.rank}"
        if endpoint.memory != "VRAM":
            return f"the pool of {rank} is in host memory"
        if not endpoint.ipc_handle:
            return f"{rank} exports no pool"
        if endpoint.ipc_host.partition("/")[0] != host_id.partition("/")[0]:
            return f"{rank} is on another host"
        if endpoint.ipc_host != host_id:
            return f"{rank} is in another PID namespace of this host; pods share one with hostPID and hostIPC"
    return None


def _endpoint_of(peer: PeerHello, rank: int) -> RankEndpoint:
    if not 0 <= rank < len(peer.ranks):
        raise TransferError(f"peer {peer.uuid} has no rank {rank}")
    return peer.ranks[rank]


def _check_inside(offsets: NDArray[np.int64], runs: ByteRuns, num_bytes: int) -> None:
    if runs.num_runs and (int(offsets.min()) < 0 or int((offsets + runs.lengths).max()) > num_bytes):
        raise TransferError(f"a run of bytes ends outside of a pool of {num_bytes} bytes")
