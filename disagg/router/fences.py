"""Who still waits to hear that a dead attempt's KV writes are over, and proof that a process is gone.

A prefill worker that lives answers an Abort with Fenced, and the router passes that on to the
decode worker that keeps the pages. One that died never will: its end is the fence, once it is
proven. A broken link or silence proves nothing.
"""

from __future__ import annotations

from dataclasses import dataclass
from urllib.parse import urlsplit

import psutil

from disagg.protocol import Abort, Fenced
from disagg.router.registry import Worker
from disagg.security import is_loopback

MAX_PENDING = 100_000
ASK_AGAIN_S = 5.0
"""An Abort is idempotent, and answered at once by a worker that knows nothing of the attempt."""

Key = tuple[str, int]


class ProcessProof:
    """The processes behind a worker's address, pinned while it lived."""

    def __init__(self, processes: list[psutil.Process]) -> None:
        self._processes = processes

    @classmethod
    def take(cls, address: str, pids: list[int]) -> ProcessProof | None:
        """Pin the processes `pids` (rank 0's first); None where they cannot be told apart from here.

        A pid says little: another pid namespace numbers other processes. That rank 0 listens on the
        very address, and that the other ranks descend from it, says that these are the ones.
        """
        try:
            processes = [psutil.Process(pid) for pid in pids]
            if not processes or not _listens(processes[0], address):
                return None
            family = {child.pid for child in processes[0].children(recursive=True)}
            return cls(processes) if all(p.pid in family for p in processes[1:]) else None
        except psutil.Error:
            return None

    def is_gone(self) -> bool:
        """Whether every one has ended. A zombie has: its memory and its links are gone."""
        return not any(_is_alive(process) for process in self._processes)


@dataclass(slots=True)
class _Owed:
    prefill: Worker
    prefill_uuid: str
    decode: Worker
    decode_uuid: str
    ask_at: float


class FenceBook:
    """Fences that decode workers wait for, by the attempt. Times are the caller's clock."""

    def __init__(self) -> None:
        self._pending: dict[Key, _Owed] = {}
        self._dead: dict[str, ProcessProof] = {}

    def __len__(self) -> int:
        return len(self._pending)

    def concerns(self, worker: Worker) -> bool:
        """Whether one that lives still has to tell, or to hear, of a fence."""
        return any(worker in (owed.prefill, owed.decode) for owed in self._pending.values())

    def expect(self, key: Key, prefill: Worker, decode: Worker, now: float) -> None:
        """Note that `decode` keeps pages of this attempt until `prefill` is known to write no more."""
        if len(self._pending) < MAX_PENDING:  # past that decode asks by itself, over its own link
            self._pending[key] = _Owed(prefill, prefill.uuid, decode, decode.uuid, now + ASK_AGAIN_S)

    def on_fenced(self, fenced: Fenced) -> None:
        """Pass a prefill worker's word on."""
        owed = self._pending.pop((fenced.transfer_id, fenced.generation), None)
        if owed is not None and owed.decode.uuid == owed.decode_uuid:
            owed.decode.tell(fenced)

    def on_lost(self, worker: Worker, proof: ProcessProof | None) -> None:
        """Watch for the proof that a lost worker's process is gone, if it owes a fence."""
        if proof is not None and any(owed.prefill_uuid == worker.uuid for owed in self._pending.values()):
            self._dead[worker.uuid] = proof

    def on_back(self, uuid: str) -> None:
        """That process is back: ask it. The Abort, or the answer to it, may have been lost with the link."""
        self._dead.pop(uuid, None)
        for owed in self._pending.values():
            if owed.prefill_uuid == uuid:
                owed.ask_at = 0.0

    def on_replaced(self, uuid: str) -> None:
        """Another process answers at its address; without a proof nothing more will be heard of it."""
        if uuid not in self._dead:
            self._pending = {key: owed for key, owed in self._pending.items() if owed.prefill_uuid != uuid}

    def check(self, now: float) -> None:
        """Pass on what the end of processes has fenced since, and ask again for what is overdue."""
        for uuid in [uuid for uuid, proof in self._dead.items() if proof.is_gone()]:
            del self._dead[uuid]
            for key in [key for key, owed in self._pending.items() if owed.prefill_uuid == uuid]:
                self.on_fenced(Fenced(*key))
        for key, owed in self._pending.items():
            if owed.ask_at <= now and owed.prefill.is_up and owed.prefill.uuid == owed.prefill_uuid:
                owed.ask_at = now + ASK_AGAIN_S
                owed.prefill.tell(Abort(*key))


def _listens(process: psutil.Process, address: str) -> bool:
    if address.startswith("ipc://"):
        path = address.removeprefix("ipc://")
        return any(str(connection.laddr) == path for connection in process.net_connections("unix"))
    port = urlsplit(address).port
    # The same number may listen on the same port of another machine.
    if not _is_here(urlsplit(address).hostname):
        return False
    return any(
        connection.status == psutil.CONN_LISTEN and connection.laddr.port == port
        for connection in process.net_connections("tcp")
    )


def _is_here(host: str | None) -> bool:
    if host is None or is_loopback(host):
        return host is not None
    return any(host == own.address for addresses in psutil.net_if_addrs().values() for own in addresses)


def _is_alive(process: psutil.Process) -> bool:
    try:
        return process.is_running() and process.status() not in (psutil.STATUS_ZOMBIE, psutil.STATUS_DEAD)
    except psutil.Error:
        return False
