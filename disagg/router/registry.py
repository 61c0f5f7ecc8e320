"""The workers this router knows: who they are, how they are, what they hold for us.

One `Worker` an address; a new process on it resets the record. Nothing here sends or decides.
"""

import heapq
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, Literal

from disagg.protocol import Abort, Fenced, KvLayout, Load, RejectReason, ToWorker, Welcome, WorkerState
from disagg.router.backlog import Backlog
from disagg.router.hashes import PromptHashes
from disagg.router.pairing import KvTerms, kv_terms, why_incompatible
from disagg.router.policy import WorkerFacts
from disagg.router.summaries import Index, SummaryFollower, Trust

if TYPE_CHECKING:
    from disagg.router.links import Link
    from disagg.router.sequence import Sequence

MAX_ORPHANS = 100_000

Standing = Literal["in", "retired", "gone"]
"""What discovery says of a worker. `retired`: its pod is being ended, so it gets nothing new. `gone`: it
is in no slice any more, and let go of as soon as nothing is held there."""

_ITEM_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2, "float8_e4m3fn": 1}


def page_bytes(layout: KvLayout) -> int:
    """KV bytes of one page over all ranks; 2 bytes an element for a dtype that is new to us."""
    item_bytes = _ITEM_BYTES.get(layout.dtype, 2)
    return layout.num_kv_heads * layout.num_layers * 2 * layout.page_size * layout.head_dim * item_bytes


class Worker:
    """One control address and the process that answers there, if any.

    `decodes` and `prefills` are the sequences that hold something there for us; each adds and
    removes itself. `is_up` says the link can be used: it answered Hello and has not been lost.
    """

    def __init__(self, address: str, number: int, index: Index) -> None:
        self.address = address
        self.number = number
        """Dense and small: this worker's bit in the prefix index."""
        self.link: Link | None = None
        self.welcome: Welcome | None = None
        self.load: Load | None = None
        self.state: WorkerState = "starting"
        self.is_up = False
        self.standing: Standing = "in"
        self.refused: str | None = None
        """Why it gets no work from this router, however ready it is."""
        self.kv_terms: KvTerms = ()
        self.router_id = ""
        """What this router is called on the present connection."""
        self.hello_at: float | None = None
        """When it was last asked who it is; None where nobody is connected."""
        self.heard_at = 0.0
        self.renewed_at = 0.0
        self.follower = SummaryFollower(index, number)
        self.trust = Trust()
        self.backlog = Backlog()
        self.decodes: set[Sequence] = set()
        self.prefills: set[Sequence] = set()
        self.promised_pages = 0
        """Pages asked for since the last Load."""
        self.is_full = False
        """It refused for want of room, and nothing has ended there since."""
        self.orphans: list[Abort | Fenced] = []
        """What gives pages back and could not be told; told when the same process is back."""
        self._foreign = 0

    @property
    def uuid(self) -> str:
        """The process; empty before the first Welcome."""
        return self.welcome.uuid if self.welcome is not None else ""

    @property
    def name(self) -> str:
        """What logs and the ledger call it."""
        return self.welcome.worker_id if self.welcome is not None else self.address

    @property
    def role(self) -> str:
        """What it does; empty before the first Welcome."""
        return self.welcome.role if self.welcome is not None else ""

    @property
    def is_ready(self) -> bool:
        """Whether it takes new work."""
        is_ours = self.standing == "in" and self.refused is None
        return is_ours and self.is_up and self.state == "ready" and self.load is not None

    @property
    def can_decode(self) -> bool:
        """Whether it can serve a whole sequence."""
        return self.is_ready and self.welcome is not None and self.welcome.role != "prefill"

    def on_welcome(self, welcome: Welcome, now: float, refused: str | None = None) -> bool:
        """Take in who answered, `refused` or not; True where it is another process than before."""
        is_new = welcome.uuid != self.uuid
        self.refused = refused
        self.kv_terms = kv_terms(welcome)
        self.welcome, self.state, self.is_up = welcome, welcome.state, True
        self.heard_at = self.renewed_at = now
        self.load = None
        self.promised_pages, self.is_full, self._foreign = 0, False, 0
        self.backlog = Backlog()
        self.follower.reset(now)
        if is_new:
            self.trust = Trust()
            self.orphans.clear()
        return is_new

    def refuse(self, welcome: Welcome, why: str, now: float) -> None:
        """Note who is there that cannot be spoken to."""
        self.welcome, self.state, self.refused = welcome, welcome.state, why
        self.follower.reset(now)

    def on_load(self, load: Load, now: float) -> None:
        """Take in how it is. Its figures replace what we reckoned since the last."""
        self.load, self.state = load, load.state
        self.promised_pages, self.is_full = 0, False
        self._foreign = max(0, load.running + load.waiting - len(self.decodes) - len(self.prefills))
        self.backlog.on_load(load.queued_tokens, load.prefill_tokens_per_s, now)

    def on_lost(self) -> None:
        """Note that its process, or the link to it, is gone."""
        self.is_up, self.load = False, None
        if self.welcome is not None:
            self.state = "lost"

    def on_rejected(self, reason: RejectReason) -> None:
        """Take a refusal for what it says of the worker, until the next Load says more."""
        if reason == "no_pages" or reason == "queue_full":
            self.is_full = True
        elif reason == "draining":
            self.state = "draining"

    def tell(self, message: ToWorker) -> None:
        """Send. What must be let go of and cannot be told now is told when the same process is back."""
        if self.is_up and self.link is not None and self.link.send(message):
            return
        if isinstance(message, Abort | Fenced):
            self._note(message)

    def take_orphans(self) -> list[Abort | Fenced]:
        """Return what is to be told, in order, once."""
        orphans, self.orphans = self.orphans, []
        return orphans

    def note_orphan(self, transfer_id: str, generation: int) -> None:
        """Remember an attempt that could not be aborted. Past the bound expiry frees it."""
        self._note(Abort(transfer_id, generation))

    def _note(self, message: Abort | Fenced) -> None:
        if len(self.orphans) < MAX_ORPHANS:
            self.orphans.append(message)

    def facts(self, matched_pages: int, now: float) -> WorkerFacts:
        """Describe a ready worker to the policy."""
        welcome, load = self.welcome, self.load
        assert welcome is not None
        assert load is not None
        page_size = welcome.layout.page_size
        free = 0 if self.is_full else load.pages_free + load.pages_cached - self.promised_pages
        return WorkerFacts(
            uuid=welcome.uuid,
            role=welcome.role,
            running=len(self.decodes) + self._foreign,
            max_num_seqs=welcome.max_num_seqs,
            free_pages=max(0, free),
            total_pages=welcome.num_pages,
            backlog_tokens=self.backlog.tokens(now),
            chunk_tokens=welcome.max_num_batched_tokens,
            matched_tokens=matched_pages * page_size if self.trust.holds(now) else 0,
            prefill_tokens_per_s=load.prefill_tokens_per_s,
            decode_step_s=load.decode_step_s,
            transfer_bytes_per_s=load.transfer_bytes_per_s,
            page_size=page_size,
            page_bytes=page_bytes(welcome.layout),
            model_hash=welcome.model_hash,
            kv_terms=self.kv_terms,
        )

    def shown_state(self) -> WorkerState:
        """Its state as people are told it."""
        if self.state != "ready":
            return self.state
        if self.standing != "in":
            return "draining"
        # A worker that has not told its load yet gets no requests, whatever it said on joining.
        return "starting" if self.load is None else "ready"

    def describe(self) -> dict[str, Any]:
        """One entry of `/disagg/workers`."""
        welcome, load = self.welcome, self.load
        assert welcome is not None
        return {
            "id": welcome.worker_id,
            "role": welcome.role,
            "state": self.shown_state(),
            "pid": welcome.pid,
            "rank_pids": welcome.rank_pids,
            "metrics_url": welcome.metrics_url,
            "tensor_parallel_size": welcome.layout.tp_size,
            "running": load.running if load else 0,
            "waiting": load.waiting if load else 0,
            "leases": load.leases if load else 0,
            "pages": {
                "total": welcome.num_pages,
                "free": load.pages_free if load else 0,
                "cached": load.pages_cached if load else 0,
                "in_use": load.pages_in_use if load else 0,
            },
            "uuid": welcome.uuid,
            "address": self.address,
            "refused": self.refused,
        }


class Registry:
    """All workers, and the prefix index over them."""

    def __init__(self, index: Index) -> None:
        self.index = index
        self._by_address: dict[str, Worker] = {}
        self._free_numbers: list[int] = []
        self._last_max_model_len: int | None = None
        """Of workers that were removed, for the time in which all are being replaced."""

    def __iter__(self) -> Iterator[Worker]:
        return iter(self._by_address.values())

    def add(self, address: str) -> Worker:
        """Make the record of a new address."""
        assert address not in self._by_address
        number = heapq.heappop(self._free_numbers) if self._free_numbers else len(self._by_address)
        worker = self._by_address[address] = Worker(address, number, self.index)
        return worker

    def get(self, address: str) -> Worker | None:
        """The record of an address."""
        return self._by_address.get(address)

    def remove(self, worker: Worker) -> None:
        """Forget a worker whose link is closed, and all its pages: its number is given again."""
        assert not worker.decodes
        assert not worker.prefills
        self._last_max_model_len = self.max_model_len()
        del self._by_address[worker.address]
        self.index.drop_worker(worker.number)
        heapq.heappush(self._free_numbers, worker.number)

    def ready(self) -> list[Worker]:
        """Workers that take new work."""
        return [worker for worker in self._by_address.values() if worker.is_ready]

    def by_uuid(self, uuid: str) -> Worker | None:
        """The ready worker of that process."""
        return next((w for w in self._by_address.values() if w.is_ready and w.uuid == uuid), None)

    def max_model_len(self) -> int | None:
        """Longest sequence that every live worker takes, or took at last; None before the first Welcome."""
        known = [w for w in self._by_address.values() if w.welcome is not None and w.refused is None]
        live = [w for w in known if w.is_up]
        welcomes = [w.welcome for w in live or known if w.welcome is not None]
        lengths = [min(w.max_model_len, w.num_pages * w.layout.page_size) for w in welcomes]
        return min(lengths, default=self._last_max_model_len)

    def facts(self, prompt: PromptHashes, now: float) -> list[WorkerFacts]:
        """Describe every ready worker, with what it holds of a prompt."""
        matched: dict[tuple[int, str], list[int]] = {}
        facts = []
        for worker in self.ready():
            assert worker.welcome is not None
            kind = (worker.welcome.layout.page_size, worker.welcome.model_hash)
            lengths = matched.get(kind)
            if lengths is None:
                lengths = matched[kind] = self.index.match(prompt.of(*kind)).tolist()
            facts.append(worker.facts(lengths[worker.number] if worker.number < len(lengths) else 0, now))
        return facts

    def incompatible(self, worker: Worker) -> dict[str, str]:
        """Name the workers of the other pool that `worker` cannot exchange KV with, and why."""
        other_role = {"prefill": "decode", "decode": "prefill"}.get(worker.role)
        others = [w for w in self if w.is_up and w.role == other_role] if worker.is_up else []
        sentences = {w.name: why_incompatible(worker.kv_terms, w.kv_terms) for w in others}
        return {name: why for name, why in sentences.items() if why is not None}
