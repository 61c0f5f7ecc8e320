"""One sequence from its queue to its end, over as many attempts as it takes.

Every handler checks that the message is of the attempt that runs and from a worker that has part
in it; anything else is late and dropped. Output is counted by position, so that whatever is told
twice reaches the client once, and a hole is noticed. A new attempt carries the output that the
client has, and the sampler draws by position: the text goes on where it was.
"""

from typing import NamedTuple, Protocol

from disagg.config import LeaseConfig
from disagg.errors import WorkerError
from disagg.frontend import DecisionOverride
from disagg.protocol import (
    Abort,
    Accepted,
    Failed,
    Fenced,
    FinishReason,
    FirstToken,
    KvReceived,
    PrefillDone,
    Rejected,
    Release,
    Reserved,
    SamplingParams,
    SequenceTokens,
)
from disagg.router.attempt import Attempt, Stage, make_generate, make_prefill, make_reserve
from disagg.router.hashes import PromptHashes
from disagg.router.ledger import SequenceRecord
from disagg.router.pairing import page_salt
from disagg.router.policy import Held, Job, Placement
from disagg.router.registry import Worker
from disagg.telemetry import RouterMetrics

ANSWER_TIMEOUT_S = 30.0
"""A worker that is alive and has not answered by then has lost the message. Long: a worker on a slow
machine answers between two steps."""
KV_GRACE_S = 5.0
"""For the last notification, after what it tells of must be done."""
STALL_TIMEOUT_S = 120.0
"""A sequence that decodes makes a token in less."""
ROOM_REASONS = frozenset({"no_pages", "queue_full"})
PAIR_BLAMELESS = ROOM_REASONS | {"peer_lost", "the engine ended it", "expired"}
"""Why a prefill fails that says nothing of whether the two workers can exchange KV."""


class Sink(Protocol):
    """Where tokens go: the request's ticket."""

    def push(
        self, index: int, token_ids: list[int], finish: FinishReason | None, cached_tokens: int | None
    ) -> None:
        """Hand over tokens, and the end."""

    def fail(self, error: WorkerError) -> None:
        """Hand over that a sequence ended without a result."""

    def on_closed(self) -> None:
        """The record of one sequence is closed."""


class Owner(Protocol):
    """What a sequence needs of the dispatcher."""

    @property
    def metrics(self) -> RouterMetrics:
        """The router's series."""

    @property
    def lease(self) -> LeaseConfig:
        """Times of leases and transfers."""

    @property
    def max_attempts(self) -> int:
        """Failures a sequence may have, plus one."""

    def requeue(self, sequence: "Sequence") -> None:
        """Place it again, before those that have not begun."""

    def unqueue(self, sequence: "Sequence") -> None:
        """It waits no more."""

    def on_ended(self, sequence: "Sequence") -> None:
        """Nothing runs for it any more."""

    def expect_fence(self, transfer_id: str, generation: int, prefill: Worker, decode: Worker) -> None:
        """Tell `decode` once no write of `prefill` can arrive."""

    def ask_snapshot(self, worker: Worker) -> None:
        """Its summary is not to be believed."""

    def poke(self) -> None:
        """What waits in the queue may be able to begin."""


class Kept(NamedTuple):
    """KV that a prefill worker still leases, or is still computing, for a decode worker that is gone."""

    worker: Worker
    generation: int
    num_tokens: int


class Sequence:
    """State of one sequence; see the module. Owned by the loop thread; `now` is the owner's clock."""

    def __init__(
        self,
        owner: Owner,
        sink: Sink,
        record: SequenceRecord,
        *,
        transfer_id: str,
        prompt: list[int],
        hashes: PromptHashes,
        sampling: SamplingParams,
        cache_salt: str,
        override: DecisionOverride | None,
        now: float,
    ) -> None:
        self.transfer_id = transfer_id
        self.record = record
        self.prompt = prompt
        self.hashes = hashes
        """Page hashes of prompt and output so far; the dispatcher renews them in a replay."""
        self.sampling = sampling
        self.cache_salt = cache_salt
        self.override = override
        self.output: list[int] = []
        self.model_hash: str | None = None
        """Of the workers of the newest attempt."""
        self.attempt: Attempt | None = None
        self.arrived_at = now
        self.last_at = now
        """When the newest token came."""
        self.is_ended = False
        self.late_generation: int | None = None
        """It ended with this attempt before prefill told how long the transfer took."""
        self.excluded_workers: frozenset[str] = frozenset()
        self.excluded_pairs: frozenset[tuple[str, str]] = frozenset()
        self._owner = owner
        self._sink = sink
        self._generation = -1
        self._strikes = 0
        self._first_at: float | None = None
        self._counted_silent = False
        self._kept: Kept | None = None

    # --- placing -----------------------------------------------------------------------------

    @property
    def num_tokens(self) -> int:
        """Tokens whose KV the next attempt needs."""
        return len(self.prompt) + len(self.output)

    def job(self) -> Job:
        """Describe what is to be placed."""
        return Job(
            num_tokens=self.num_tokens,
            max_new_tokens=self.sampling.max_tokens - len(self.output),
            excluded_pairs=self.excluded_pairs,
            excluded_workers=self.excluded_workers,
            model_hash=self.model_hash if self.output else None,
        )

    def held(self) -> Held | None:
        """Tell what a prefill worker still has of an attempt that lost its decode worker."""
        attempt = self.attempt
        if attempt is not None and attempt.prefill is not None:
            counted = attempt.sent_tokens + attempt.accepted_tokens
            return Held(attempt.prefill.uuid, len(attempt.token_ids), counted)
        kept = self._kept
        return None if kept is None else Held(kept.worker.uuid, kept.num_tokens, 0)

    def begin(self, placement: Placement, decode: Worker, prefill: Worker | None, now: float) -> None:
        """Start an attempt where it was placed."""
        self._keep_attempt()
        self._generation += 1
        assert decode.welcome is not None
        self.model_hash = decode.welcome.model_hash
        token_ids = self.prompt + self.output if self.output else self.prompt
        attempt = Attempt(
            self._generation, placement, decode, prefill, token_ids, base=len(self.output), now=now
        )
        self.attempt = attempt
        self._note_placement(placement, decode, prefill, now)
        decode.decodes.add(self)
        if prefill is not None:
            prefill.prefills.add(self)
        self._count_in(attempt, decode)
        self._send_first(attempt, decode, now)
        if prefill is None:
            self._drop_kept()

    def _keep_attempt(self) -> None:
        """Remember where the KV of an attempt without its decode worker is; its messages are late now."""
        attempt = self.attempt
        if attempt is not None and attempt.prefill is not None:
            self._settle(attempt, attempt.prefill)
            self._kept = Kept(attempt.prefill, attempt.generation, len(attempt.token_ids))

    def _note_placement(
        self, placement: Placement, decode: Worker, prefill: Worker | None, now: float
    ) -> None:
        record = self.record
        if self._generation == 0:
            record.phases.add("queue_s", now - self.arrived_at)
            self._owner.metrics.queue_s.observe(now - self.arrived_at)
        record.attempts += 1
        record.decision, record.reason = placement.decision, placement.reason
        record.predicted = placement.predicted
        record.decode_worker = decode.name
        record.prefill_worker = prefill.name if prefill is not None else None
        if placement.is_silent and not self._counted_silent:
            self._counted_silent = True
            self._owner.metrics.silent_local.inc()

    def _count_in(self, attempt: Attempt, decode: Worker) -> None:
        """Count what the attempt will take, until the workers tell it themselves."""
        predicted = attempt.placement.predicted
        assert decode.welcome is not None
        page_size = decode.welcome.layout.page_size
        lacks = len(attempt.token_ids) + 1 - (predicted.decode_cached_tokens or 0)
        attempt.promised_pages = max(0, -(-lacks // page_size))
        decode.promised_pages += attempt.promised_pages
        computing = attempt.computing
        assert computing is not None
        cached = predicted.decode_cached_tokens if attempt.is_local else predicted.prefill_cached_tokens
        attempt.sent_tokens = max(1, len(attempt.token_ids) - (cached or 0))
        computing.backlog.on_sent(attempt.sent_tokens)

    def _send_first(self, attempt: Attempt, decode: Worker, now: float) -> None:
        make = make_generate if attempt.is_local else make_reserve
        attempt.deadline_at = now + ANSWER_TIMEOUT_S
        ttl_s = self._owner.lease.lease_ttl_s
        decode.tell(make(attempt, self.transfer_id, len(self.prompt), self.sampling, self._salt(), ttl_s))

    def _salt(self) -> str:
        """The salt of this attempt's pages."""
        return page_salt(self.model_hash or "", self.cache_salt)

    # --- what workers say --------------------------------------------------------------------

    def on_reserved(self, worker: Worker, message: Reserved, now: float) -> None:
        """Decode holds the pages: have the prompt computed into them."""
        attempt = self._current(message.generation)
        if attempt is None or attempt.decode is not worker or attempt.stage != "reserve":
            return
        prefill = attempt.prefill
        assert prefill is not None, "an attempt without its prefill worker ends before it is sent a prompt"
        self.record.phases.add("reserve_s", now - attempt.sent_at)
        if not self.output:
            self.record.cached_tokens.decode = message.cached_tokens
        attempt.writer, attempt.sent_at = "open", now
        lease = self._owner.lease
        predicted_s = attempt.placement.predicted.remote_s or 0.0
        # A prompt that is known to take long gets longer.
        deadline_s = lease.transfer_timeout_s + 2 * predicted_s
        attempt.deadline_at = now + deadline_s + KV_GRACE_S
        prefill.tell(
            make_prefill(
                attempt,
                message,
                len(self.prompt),
                self.sampling,
                self._salt(),
                ttl_s=lease.lease_ttl_s,
                deadline_s=deadline_s,
            )
        )
        self._drop_kept()

    def on_rejected(self, worker: Worker, message: Rejected, now: float) -> None:
        """A worker refused, and holds nothing of the attempt."""
        attempt = self._current(message.generation)
        if attempt is None or worker not in (attempt.decode, attempt.prefill):
            return
        reason = message.reason
        if worker is attempt.prefill:
            attempt.writer = "fenced"
        worker.on_rejected(reason)
        if reason == "too_long":
            self.excluded_workers |= {worker.uuid}
        elif worker is attempt.prefill and reason in ("layout_mismatch", "peer_unreachable"):
            self._exclude_pair(attempt)
        self._detach(attempt, worker)
        is_room = reason in ROOM_REASONS or reason == "draining"
        self._fail_attempt(f"{worker.name}: {reason}", now, is_strike=not is_room, has_begun=not is_room)

    def on_accepted(self, worker: Worker, message: Accepted, now: float) -> None:
        """The prompt is queued at the worker that computes it."""
        attempt = self._current(message.generation)
        if attempt is None or attempt.computing is not worker:
            return
        self._settle_sent(attempt, worker, len(attempt.token_ids) - message.cached_tokens, now)
        self._compare_cached(attempt, worker, message.cached_tokens, now)
        cached = self.record.cached_tokens
        if attempt.is_local:
            attempt.deadline_at = now + STALL_TIMEOUT_S
            if not self.output:
                cached.decode, cached.prefill = message.cached_tokens, 0
        elif not self.output:
            cached.prefill = message.cached_tokens
        self._owner.poke()

    def on_first_token(self, worker: Worker, message: FirstToken, now: float) -> None:
        """Prefill has sampled; the client need not wait for the KV."""
        attempt = self._current(message.generation)
        if attempt is None or attempt.prefill is not worker or attempt.has_first:
            return
        if message.position > len(self.output):
            self._fail_attempt("tokens were lost", now)
            return
        attempt.has_first, attempt.first_at = True, now
        self._settle_sent(attempt, worker, len(attempt.token_ids) - message.cached_tokens, now)
        self._settle_computed(attempt, worker)
        phases = self.record.phases
        phases.add("prefill_s", now - attempt.sent_at)
        phases.add("prefill_queue_s", message.queue_s)
        phases.add("prefill_compute_s", message.compute_s)
        if not self.output:
            self.record.cached_tokens.prefill = message.cached_tokens
        attempt.finish = message.finish_reason
        self._owner.poke()
        tokens = [message.token_id] if message.position == len(self.output) else []
        if attempt.finish is not None and (attempt.has_kv or attempt.decode is None):
            self._finish(tokens, attempt.finish, now)
            return
        if tokens:
            self._push(tokens, None, now)
        if attempt.finish is not None:
            attempt.deadline_at = min(attempt.deadline_at, now + KV_GRACE_S)
            return
        early, attempt.early = attempt.early, []
        for part in early:
            if self.attempt is attempt and attempt.decode is not None:
                self.on_tokens(attempt.decode, part, now)

    def on_prefill_done(self, worker: Worker, message: PrefillDone, now: float) -> None:
        """Every write has completed: nothing more can arrive."""
        if self.late_generation is not None and message.generation == self.late_generation:
            self._note_transfer(message)
            self.late_generation = None
            return
        attempt = self._current(message.generation)
        if attempt is None or attempt.prefill is not worker or attempt.prefill_done:
            return
        attempt.prefill_done = True
        if attempt.writer == "open":
            attempt.writer = "fenced"
        self._note_transfer(message)
        if attempt.has_kv and attempt.has_first:
            self._release_prefill(attempt)
        elif attempt.decode is not None:
            attempt.deadline_at = min(attempt.deadline_at, now + 2 * KV_GRACE_S)

    def _note_transfer(self, message: PrefillDone) -> None:
        self.record.kv.seconds += message.transfer_s
        self._owner.metrics.kv_s.observe(message.transfer_s)

    def on_kv_received(self, worker: Worker, message: KvReceived, now: float) -> None:
        """Decode has all KV and has begun."""
        attempt = self._current(message.generation)
        if attempt is None or attempt.decode is not worker or attempt.is_local or attempt.has_kv:
            return
        attempt.has_kv = True
        attempt.writer = "fenced"
        kv = self.record.kv
        kv.pages += message.num_pages
        kv.bytes_expected += message.bytes_expected
        kv.bytes_received += message.bytes_received
        kv.transport = message.transport
        self._owner.metrics.kv_bytes.labels(message.transport).inc(message.bytes_received)
        if attempt.first_at is not None:
            self.record.phases.add("transfer_s", now - attempt.first_at)
        # Prefill sent its token before the KV, so that is due as well.
        attempt.deadline_at = now + (STALL_TIMEOUT_S if attempt.has_first else KV_GRACE_S)
        if attempt.finish is not None:
            self._finish([], attempt.finish, now)
        elif attempt.prefill_done and attempt.has_first:
            self._release_prefill(attempt)

    def on_tokens(self, worker: Worker, part: SequenceTokens, now: float) -> None:
        """Decode has made tokens."""
        attempt = self.attempt
        if attempt is None or attempt.generation != part.generation or attempt.decode is not worker:
            return
        token_ids, known = part.token_ids, len(self.output) - part.position
        if known != 0:
            if known < 0:
                if not attempt.has_first:
                    attempt.early.append(part)
                else:
                    self._fail_attempt("tokens were lost", now)
                return
            token_ids = token_ids[known:]
        attempt.deadline_at = now + STALL_TIMEOUT_S
        if attempt.is_local and attempt.first_at is None and token_ids:
            self._on_local_first(attempt, worker, part.cached_tokens, now)
        reason = part.finish_reason
        if reason is None:
            if token_ids:
                self._push(token_ids, None, now)
        elif reason == "stop" or reason == "length":
            self._finish(token_ids, reason, now)
        else:
            if token_ids:
                self._push(token_ids, None, now)
            self._on_given_up(attempt, worker, reason, now)

    def on_failed(self, worker: Worker, message: Failed, now: float) -> None:
        """An attempt ended at a worker without a result."""
        attempt = self._current(message.generation)
        if attempt is None or worker not in (attempt.decode, attempt.prefill):
            return
        kind = message.reason.partition(":")[0]
        if not attempt.is_local:
            self._owner.metrics.kv_failures.labels(kind).inc()
        if worker is attempt.prefill and message.fenced:
            attempt.writer = "fenced"
        elif attempt.writer == "open" and attempt.prefill is not None and attempt.decode is not None:
            self._owner.expect_fence(self.transfer_id, attempt.generation, attempt.prefill, attempt.decode)
        if worker is attempt.prefill and kind not in PAIR_BLAMELESS:
            self._exclude_pair(attempt)
        is_kept = attempt.decode is None
        self._detach(attempt, worker)
        if is_kept:
            self.attempt = None  # only its KV was of use, for the next attempt
            return
        is_strike = kind not in ROOM_REASONS
        self._fail_attempt(f"{worker.name}: {message.reason}", now, is_strike=is_strike)

    def on_worker_lost(self, worker: Worker, now: float) -> None:
        """A worker that had part in the attempt is gone, or cannot be reached."""
        if self._kept is not None and self._kept.worker is worker:
            worker.note_orphan(self.transfer_id, self._kept.generation)
            worker.prefills.discard(self)
            self._kept = None
        attempt = self.attempt
        if attempt is None:
            return
        if worker is attempt.decode:
            self._on_decode_lost(attempt, worker, now)
        elif worker is attempt.prefill:
            self._on_prefill_lost(attempt, worker, now)

    def on_tick(self, now: float) -> None:
        """Give up an attempt that has waited too long for what comes next."""
        attempt = self.attempt
        if attempt is None or attempt.decode is None or now < attempt.deadline_at:
            return
        if not attempt.is_local and attempt.has_first and not attempt.has_kv:
            self._owner.metrics.kv_failures.labels("timeout").inc()
            self._exclude_pair(attempt)
        self._fail_attempt(f"timeout in {attempt.stage}", now)

    # --- what the client does ----------------------------------------------------------------

    def stop(self, reason: FinishReason, release: str, now: float) -> None:
        """End it for the client's sake; both sides are told to let go. Idempotent."""
        if self.is_ended:
            return
        self._owner.unqueue(self)
        if self.attempt is not None:
            self._abort_attempt(self.attempt)
            self.attempt = None
        self._drop_kept()
        self._close(reason, release, now)

    def cut(self, num_tokens: int, now: float) -> None:
        """End it at a stop string, or let the record of one that has ended say so."""
        del self.output[num_tokens:]
        self.stop("stop", "cancelled", now)
        self.record.finish_reason, self.record.completion_tokens = "stop", num_tokens

    def give_up(self, why: str, now: float) -> None:
        """End it without a result."""
        release = "worker_lost" if self.record.attempts else "not_placed"
        self.record.failures.append(why)
        self.stop("error", release, now)
        self._sink.fail(WorkerError(why))

    # --- endings of an attempt ---------------------------------------------------------------

    def _on_local_first(self, attempt: Attempt, worker: Worker, cached: int | None, now: float) -> None:
        attempt.first_at = now
        self._settle_sent(attempt, worker, len(attempt.token_ids) - (cached or 0), now)
        self._settle_computed(attempt, worker)
        self.record.phases.add("prefill_s", now - attempt.sent_at)
        if not self.output and cached is not None:
            self.record.cached_tokens.decode = cached
        self._owner.poke()

    def _on_given_up(self, attempt: Attempt, worker: Worker, reason: FinishReason, now: float) -> None:
        """The worker ended it for reasons of its own, and holds nothing of it."""
        self._detach(attempt, worker)
        if reason == "handed_back":
            worker.is_full = True
            # One that comes no further each time would go round for ever.
            self._fail_attempt(reason, now, is_strike=len(self.output) == attempt.base)
        else:
            self._fail_attempt(f"{worker.name}: {reason}", now)

    def _on_decode_lost(self, attempt: Attempt, worker: Worker, now: float) -> None:
        stage = attempt.stage
        worker.note_orphan(self.transfer_id, attempt.generation)
        self._detach(attempt, worker)
        if attempt.finish is not None:
            self._finish([], attempt.finish, now, release="worker_lost")
            return
        if stage in ("prefill", "transfer") and attempt.prefill is not None:
            # It goes on, or leases what it has: another decode worker gets it without a new prefill.
            attempt.early.clear()
            self._again(f"{worker.name} was lost", stage, now)
            return
        self._fail_attempt(f"{worker.name} was lost", now, stage=stage)

    def _on_prefill_lost(self, attempt: Attempt, worker: Worker, now: float) -> None:
        stage, done = attempt.stage, attempt.writer == "fenced"
        if attempt.writer != "none":
            worker.note_orphan(self.transfer_id, attempt.generation)
        if attempt.writer == "open" and attempt.decode is not None:
            self._owner.expect_fence(self.transfer_id, attempt.generation, worker, attempt.decode)
        self._detach(attempt, worker)
        if attempt.decode is None:
            self.attempt = None  # only its KV was kept, for the next attempt
        elif not (attempt.has_first and done):
            self._fail_attempt(f"{worker.name} was lost", now, stage=stage)
        elif not attempt.has_kv:
            attempt.deadline_at = now + KV_GRACE_S

    def _fail_attempt(
        self,
        why: str,
        now: float,
        *,
        is_strike: bool = True,
        has_begun: bool = True,
        stage: Stage | None = None,
    ) -> None:
        """End the attempt at both sides and try again, unless only its KV was awaited."""
        attempt = self.attempt
        assert attempt is not None
        if attempt.finish is not None:
            # The client has all its tokens. That the KV was not seen to arrive is in the record.
            self.record.failures.append(why)
            self._finish([], attempt.finish, now, release="aborted")
            return
        stage = stage or attempt.stage
        self._abort_attempt(attempt)
        self.attempt = None
        self._again(why, stage, now, is_strike=is_strike, has_begun=has_begun)

    def _again(
        self, why: str, stage: Stage, now: float, *, is_strike: bool = True, has_begun: bool = True
    ) -> None:
        self._owner.metrics.retries.labels(stage).inc()
        self._strikes += is_strike
        if self._strikes >= self._owner.max_attempts:
            self.give_up(why, now)
            return
        if has_begun:
            self.record.failures.append(why)
        else:
            self.record.attempts -= 1  # it waits on, as in the queue: a full pool may refuse it often
        self._owner.requeue(self)

    def _abort_attempt(self, attempt: Attempt) -> None:
        """Have both sides let go of whatever the attempt still holds there."""
        key = (self.transfer_id, attempt.generation)
        decode, prefill = attempt.decode, attempt.prefill
        if prefill is not None:
            self._detach(attempt, prefill)
            if attempt.writer == "open":
                if decode is not None:
                    self._owner.expect_fence(*key, prefill, decode)
                prefill.tell(Abort(*key))
            elif attempt.writer == "fenced":
                prefill.tell(Release(*key))
        if decode is not None:
            self._detach(attempt, decode)
            decode.tell(Abort(*key))
            if not attempt.is_local and attempt.writer != "open" and not attempt.has_kv:
                # Decode keeps what was to be written until it hears that nothing will be.
                decode.tell(Fenced(*key))

    def _drop_kept(self) -> None:
        """Have a prefill worker let go of what it kept of an earlier attempt. Idempotent.

        Where it takes part in the attempt that runs now, this is sent after the new Prefill: what
        that one locks stays cached in between.
        """
        kept, self._kept = self._kept, None
        if kept is not None:
            if self.attempt is None or self.attempt.prefill is not kept.worker:
                kept.worker.prefills.discard(self)
            kept.worker.tell(Abort(self.transfer_id, kept.generation))

    def _release_prefill(self, attempt: Attempt) -> None:
        prefill = attempt.prefill
        if prefill is not None:
            self._detach(attempt, prefill)
            prefill.tell(Release(self.transfer_id, attempt.generation))

    def _finish(
        self, token_ids: list[int], reason: FinishReason, now: float, release: str = "finished"
    ) -> None:
        """End with a result. The record is closed before the client can know."""
        attempt = self.attempt
        assert attempt is not None
        if release == "aborted" or attempt.decode is None:
            self._abort_attempt(attempt)
        else:
            if attempt.prefill is not None and attempt.has_kv and not attempt.prefill_done:
                self.late_generation = attempt.generation
            self._release_prefill(attempt)
            decode = attempt.decode
            self._detach(attempt, decode)
            decode.tell(Release(self.transfer_id, attempt.generation))
        self.attempt = None
        self._drop_kept()
        self._owner.unqueue(self)
        cached = self._take(token_ids, now)
        self._close(reason, release, now)
        self._sink.push(self.record.index, token_ids, reason, cached)

    def _close(self, reason: FinishReason, release: str, now: float) -> None:
        record = self.record
        record.finish_reason, record.release = reason, release
        record.completion_tokens = len(self.output)
        if self._first_at is not None:
            record.phases.decode_s = self.last_at - self._first_at
        record.phases.total_s = now - self.arrived_at
        self.is_ended = True
        self._owner.on_ended(self)
        self._sink.on_closed()

    # --- bookkeeping -------------------------------------------------------------------------

    def _push(self, token_ids: list[int], finish: FinishReason | None, now: float) -> None:
        self._sink.push(self.record.index, token_ids, finish, self._take(token_ids, now))

    def _take(self, token_ids: list[int], now: float) -> int | None:
        """Add to the output; return what was cached, once."""
        if not token_ids:
            return None
        self.output += token_ids
        self.last_at = now
        if self._first_at is not None:
            return None
        self._first_at = now
        record = self.record
        record.phases.ttft_s = now - self.arrived_at
        cached = record.cached_tokens
        return cached.prefill if record.decision == "disaggregated" else cached.decode

    def _current(self, generation: int) -> Attempt | None:
        attempt = self.attempt
        return attempt if attempt is not None and attempt.generation == generation else None

    def _exclude_pair(self, attempt: Attempt) -> None:
        placement = attempt.placement
        assert placement.prefill_uuid is not None
        self.excluded_pairs |= {(placement.prefill_uuid, placement.decode_uuid)}

    def _detach(self, attempt: Attempt, worker: Worker) -> None:
        """Take the attempt off a worker's books."""
        if worker is attempt.computing:
            self._settle(attempt, worker)
        if worker is attempt.decode:
            attempt.decode = None
            worker.decodes.discard(self)
            worker.promised_pages -= attempt.promised_pages
        else:
            attempt.prefill = None
            if self._kept is None or self._kept.worker is not worker:
                worker.prefills.discard(self)
        self._owner.poke()

    def _settle(self, attempt: Attempt, worker: Worker) -> None:
        if attempt.sent_tokens:
            worker.backlog.on_refused(attempt.sent_tokens)
            attempt.sent_tokens = 0
        self._settle_computed(attempt, worker)

    def _settle_sent(self, attempt: Attempt, worker: Worker, new_tokens: int, now: float) -> None:
        if attempt.sent_tokens:
            worker.backlog.on_answered(attempt.sent_tokens, new_tokens, now)
            attempt.sent_tokens, attempt.accepted_tokens = 0, new_tokens

    def _settle_computed(self, attempt: Attempt, worker: Worker) -> None:
        if attempt.accepted_tokens:
            worker.backlog.on_computed(attempt.accepted_tokens)
            attempt.accepted_tokens = 0

    def _compare_cached(self, attempt: Attempt, worker: Worker, found: int, now: float) -> None:
        predicted = attempt.placement.predicted
        promised = (
            predicted.decode_cached_tokens if attempt.is_local else predicted.prefill_cached_tokens
        ) or 0
        self._owner.metrics.prefix_predicted.inc(promised)
        self._owner.metrics.prefix_actual.inc(found)
        if worker.trust.observe(promised, found, now):
            self._owner.metrics.distrusted.inc()
            self._owner.ask_snapshot(worker)
