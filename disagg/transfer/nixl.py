"""KV over NIXL: the one file that knows its handles, state strings and exceptions.

NIXL's progress thread burns most of a core when idle, so it stays off and `poll` progresses. Its
pickled descriptor lists are never read or sent: both sides' lists are built here from page ids.
A write whose state is done has landed: NIXL's UCX backend flushes the endpoint first.
"""

from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from disagg.errors import ConfigError, LinkLost, TransferError
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

ERROR_OF: dict[str, type[TransferError]] = {
    "nixlBackendError": TransferError,
    "nixlCancelledError": LinkLost,
    "nixlInvalidParamError": TransferError,
    "nixlMismatchError": TransferError,
    "nixlNoTelemetryError": TransferError,
    "nixlNotAllowedError": TransferError,
    "nixlNotFoundError": TransferError,
    "nixlNotPostedError": TransferError,
    "nixlNotSupportedError": TransferError,
    "nixlRemoteDisconnectError": LinkLost,
    "nixlRepostActiveError": TransferError,
    "nixlUnknownError": TransferError,
}
"""NIXL's exceptions by name, and ours. A test fails when NIXL grows one that is missing here."""


@dataclass(slots=True)
class _Peer:
    hello: PeerHello
    lost: set[int]
    """Ranks whose link broke: reconnected before the next use."""


@dataclass(frozen=True, slots=True)
class _OpenWrite:
    handle: Any
    peer_uuid: str
    target_rank: int


class NixlTransport:
    """One rank's NIXL agent over its registered pool."""

    name = "nixl"

    def __init__(self, *, uuid: str, rank: int, pool: PoolMemory) -> None:
        self._pool = pool
        self._rank = rank
        self._peers: dict[str, _Peer] = {}
        self._open: dict[WriteId, _OpenWrite] = {}
        self._ended: list[TransportEvent] = []
        self._next_id = 0
        api, self._errors = _import_nixl()
        with self._translated("create the transfer agent"):
            self._agent = api.nixl_agent(
                agent_name(uuid, rank), api.nixl_agent_config(backends=["UCX"], enable_prog_thread=False)
            )
            if "UCX" not in self._agent.backends:
                raise ConfigError("NIXL has no UCX backend on this machine: its plugin did not load")
            self._registration = self._agent.register_memory(
                [(pool.address, pool.num_bytes, pool.device_id, "")], pool.memory
            )

    def endpoint(self) -> RankEndpoint:
        """Say how peers reach this rank's pool."""
        with self._translated("read the agent's metadata"):
            metadata = self._agent.get_agent_metadata()
        return RankEndpoint(
            rank=self._rank,
            agent_name=self._agent.name,
            agent_metadata=metadata,
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
        """Load the metadata of every rank of a peer; links open with the first write."""
        if peer.uuid in self._peers:
            return
        loaded: list[str] = []
        try:
            for endpoint in peer.ranks:
                self._load(peer, endpoint)
                loaded.append(endpoint.agent_name)
        except TransferError:
            for name in loaded:
                self._forget(name)
            raise
        self._peers[peer.uuid] = _Peer(peer, set())

    def disconnect(self, peer_uuid: str) -> None:
        """Forget a peer; its open writes end with LinkLost."""
        peer = self._peers.pop(peer_uuid, None)
        if peer is None:
            return
        for write_id in [i for i, write in self._open.items() if write.peer_uuid == peer_uuid]:
            self._end(write_id, LinkLost(f"peer {peer_uuid} was disconnected"))
        for endpoint in peer.hello.ranks:
            self._forget(endpoint.agent_name)

    def post(self, write: Write) -> WriteId:
        """Start a write. On one host without a GPU UCX copies it here and now, without the GIL."""
        endpoint = self._endpoint(write.peer_uuid, write.target_rank)
        local = _addresses(self._pool.address, write.runs.source_offsets, write, self._pool.device_id)
        remote = _addresses(endpoint.base_address, write.runs.target_offsets, write, endpoint.device_id)
        try:
            with self._translated(f"prepare a write to {endpoint.agent_name}"):
                handle = self._agent.initialize_xfer(
                    "WRITE",
                    self._agent.get_xfer_descs(local, self._pool.memory),
                    self._agent.get_xfer_descs(remote, endpoint.memory),
                    endpoint.agent_name,
                )
        except TransferError:
            # NIXL forgets an agent whose link broke, and then finds nothing at its addresses.
            self._peers[write.peer_uuid].lost.add(write.target_rank)
            raise
        write_id = WriteId(self._next_id)
        self._next_id += 1
        self._open[write_id] = _OpenWrite(handle, write.peer_uuid, write.target_rank)
        try:
            with self._translated(f"post a write to {endpoint.agent_name}"):
                state = self._agent.transfer(handle)
        except TransferError as error:
            # Some descriptors may be under way: whatever the cause, this is no refusal.
            self._end(write_id, LinkLost(str(error)))
            return write_id
        self._on_state(write_id, state)
        return write_id

    def notify(self, peer_uuid: str, target_rank: int, payload: bytes) -> None:
        """Send a small message to one rank of a peer."""
        endpoint = self._endpoint(peer_uuid, target_rank)
        try:
            with self._translated(f"notify {endpoint.agent_name}"):
                self._agent.send_notif(endpoint.agent_name, payload)
        except TransferError as error:
            self._peers[peer_uuid].lost.add(target_rank)
            raise LinkLost(str(error)) from error

    def poll(self) -> list[TransportEvent]:
        """Progress UCX; return ended writes and notifications."""
        with self._translated("progress"):
            notifications = self._agent.get_new_notifs()
        for name, payloads in notifications.items():
            self._ended.extend(Notified(name, payload) for payload in payloads)
        for write_id, write in list(self._open.items()):
            try:
                with self._translated(f"check a write to {write.peer_uuid}:{write.target_rank}"):
                    state = self._agent.check_xfer_state(write.handle)
            except TransferError as error:
                self._end(write_id, LinkLost(str(error)))
            else:
                self._on_state(write_id, state)
        events, self._ended = self._ended, []
        return events

    def close(self) -> None:
        """Give up peers and the registration of the pool."""
        for peer_uuid in list(self._peers):
            self.disconnect(peer_uuid)
        with self._translated("deregister the pool"):
            self._agent.deregister_memory(self._registration)

    @contextmanager
    def _translated(self, action: str) -> Iterator[None]:
        """Raise NIXL's exceptions as ours."""
        try:
            yield
        except tuple(self._errors) as error:
            message = f"cannot {action}: {type(error).__name__} {error}"
            raise self._errors[type(error)](message) from error

    def _on_state(self, write_id: WriteId, state: str) -> None:
        if state == "DONE":
            self._end(write_id, None)
        elif state == "ERR":
            self._end(write_id, LinkLost("the write ended in an error"))

    def _end(self, write_id: WriteId, error: TransferError | None) -> None:
        write = self._open.pop(write_id)
        peer = self._peers.get(write.peer_uuid)
        if error is not None and peer is not None:
            peer.lost.add(write.target_rank)
        # Of a write still under way this asks UCX to cancel it. Refused, the handle tries once
        # more when it is collected; the write's own outcome stands.
        with suppress(TransferError), self._translated("release a write"):
            self._agent.release_xfer_handle(write.handle)
        self._ended.append(WriteEnded(write_id, error))

    def _endpoint(self, peer_uuid: str, rank: int) -> RankEndpoint:
        peer = self._peers.get(peer_uuid)
        if peer is None:
            raise LinkLost(f"peer {peer_uuid} is not connected")
        if not 0 <= rank < len(peer.hello.ranks):
            raise TransferError(f"peer {peer_uuid} has no rank {rank}")
        endpoint = peer.hello.ranks[rank]
        if rank in peer.lost:
            # NIXL never reopens a broken link by itself; the peer may well be alive.
            self._forget(endpoint.agent_name)
            self._load(peer.hello, endpoint)
            peer.lost.discard(rank)
        return endpoint

    def _load(self, peer: PeerHello, endpoint: RankEndpoint) -> None:
        if endpoint.agent_name != agent_name(peer.uuid, endpoint.rank):
            raise TransferError(f"agent {endpoint.agent_name} is not rank {endpoint.rank} of {peer.uuid}")
        with self._translated(f"load the metadata of {endpoint.agent_name}"):
            name = self._agent.add_remote_agent(endpoint.agent_metadata)
        name = name.decode() if isinstance(name, bytes) else name
        if name != endpoint.agent_name:
            self._forget(name)
            raise TransferError(f"metadata of {endpoint.agent_name} belongs to {name}")

    def _forget(self, name: str) -> None:
        # Refused where NIXL dropped the agent by itself, when the link broke.
        with suppress(TransferError), self._translated(f"forget {name}"):
            self._agent.remove_remote_agent(name)


def _addresses(
    base_address: int, offsets: NDArray[np.int64], write: Write, device_id: int
) -> NDArray[np.uint64]:
    """Rows of `(address, length, device)`, as NIXL takes them."""
    rows = np.empty((len(offsets), 3), np.uint64)
    rows[:, 0] = offsets.astype(np.uint64) + np.uint64(base_address)
    rows[:, 1] = write.runs.lengths
    rows[:, 2] = device_id
    return rows


def _import_nixl() -> tuple[Any, dict[type[Exception], type[TransferError]]]:
    """Import NIXL here and nowhere else: its Python API, and its exceptions with ours."""
    try:
        from nixl import _api, _bindings
    except ImportError as error:
        raise ConfigError(f"transport nixl needs the package nixl, which does not load: {error}") from error
    return _api, {
        getattr(_bindings, name): kind for name, kind in ERROR_OF.items() if hasattr(_bindings, name)
    }
