"""Who still waits to hear that a dead attempt's KV writes are over.

A prefill worker that lives answers an Abort with Fenced, and the router passes that on to the
decode worker that keeps the pages. One that died never will: its end is the fence, once it is
proven. A broken link or silence proves nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from disagg.protocol import Abort, Fenced
from disagg.router.proofs import Proof
from disagg.router.registry import Worker

MAX_PENDING = 100_000
ASK_AGAIN_S = 5.0
"""An Abort is idempotent, and answered at once by a worker that knows nothing of the attempt."""

Key = tuple[str, int]


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
        self._dead: dict[str, Sequence[Proof]] = {}
        """By uuid: processes that are lost and owe a fence, and what may prove that they are gone."""

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

    def on_lost(self, worker: Worker, proofs: Sequence[Proof]) -> None:
        """Watch for a proof that a lost worker's process is gone, if it owes a fence."""
        if proofs and any(owed.prefill_uuid == worker.uuid for owed in self._pending.values()):
            self._dead[worker.uuid] = proofs

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
        for uuid in [uuid for uuid, proofs in self._dead.items() if any(p.is_gone() for p in proofs)]:
            del self._dead[uuid]
            for key in [key for key, owed in self._pending.items() if owed.prefill_uuid == uuid]:
                self.on_fenced(Fenced(*key))
        for key, owed in self._pending.items():
            if owed.ask_at <= now and owed.prefill.is_up and owed.prefill.uuid == owed.prefill_uuid:
                owed.ask_at = now + ASK_AGAIN_S
                owed.prefill.tell(Abort(*key))
