"""Which workers a sequence goes to, and whether it is disaggregated. Pure functions over records.

Decode first: its pages are the scarce thing, and its own cache decides how much must move. Then,
by mode, prefill there or elsewhere. Times are predictions in seconds from what workers measure;
where a worker has measured nothing yet, an assumed figure stands in, the same for all, so that it never
tips a choice between workers. Ties go to the lower uuid, so that router replicas with equal facts
choose alike.

A placement is made when it can begin: `Wait` says that every suitable worker has a chunk's worth
of prompts before it or no room, and the sequence stays in the router's queue.
"""

from collections.abc import Callable, Sequence
from typing import Literal

import msgspec
from msgspec import Struct

from disagg.config import DisaggregateMode, RoutingPolicyName
from disagg.protocol import Role
from disagg.router.pairing import KvTerms

Decision = Literal["disaggregated", "local"]


ASSUMED_PREFILL_TOKENS_PER_S = 2_000.0
ASSUMED_DECODE_STEP_S = 0.03
ASSUMED_TRANSFER_BYTES_PER_S = 1e9
HAND_OVER_S = 0.002
"""What a second worker costs however little moves: two more messages and one more queue."""
MAX_EXPECTED_TOKENS = 256
"""Clients ask for far more output than they use; more of it says nothing about a queue."""


class WorkerFacts(Struct, frozen=True):
    """One ready worker as a decision sees it."""

    uuid: str
    role: Role
    running: int
    """Sequences that decode here or hold a reservation."""
    max_num_seqs: int
    free_pages: int
    """Free or evictable, less what is promised."""
    total_pages: int
    backlog_tokens: float
    """Prompt tokens handed to it and not yet computed."""
    chunk_tokens: int
    """Token budget of one step."""
    matched_tokens: int
    """Longest cached prefix of this prompt, whole pages."""
    prefill_tokens_per_s: float
    decode_step_s: float
    transfer_bytes_per_s: float
    page_size: int
    page_bytes: int
    """KV bytes of one page over all ranks."""
    model_hash: str = ""
    kv_terms: KvTerms = ()
    """Equal on both sides of a pair, or they cannot exchange KV."""


class Held(Struct, frozen=True):
    """What a worker still has of a sequence, from an attempt that lost its decode worker."""

    uuid: str
    num_tokens: int
    """Tokens whose KV it has, or is computing."""
    backlog_tokens: int
    """Of those, counted in its backlog."""


class Job(Struct, frozen=True):
    """What is to be placed."""

    num_tokens: int
    """Prompt, and in a replay the output so far."""
    max_new_tokens: int
    excluded_pairs: frozenset[tuple[str, str]] = frozenset()
    """(prefill uuid, decode uuid) that failed to exchange KV for this sequence."""
    excluded_workers: frozenset[str] = frozenset()
    model_hash: str | None = None
    """The model that made its output so far; None where any may begin."""


class Predicted(Struct, frozen=True, gc=False):
    """What a decision was based on; part of the ledger record. None where there was no such choice."""

    remote_s: float | None = None
    local_s: float | None = None
    prefill_cached_tokens: int | None = None
    decode_cached_tokens: int | None = None


class Placement(Struct, frozen=True):
    """Where a sequence goes. `prefill_uuid` is None for a local one."""

    decision: Decision
    reason: str
    decode_uuid: str
    prefill_uuid: str | None
    cap_match: bool
    predicted: Predicted
    is_silent: bool = False
    """It should have been disaggregated, and no worker was there for it."""


class Wait(Struct, frozen=True):
    """Not now."""

    reason: str


class Impossible(Struct, frozen=True):
    """No worker that is there could ever take it."""

    reason: str


class Stranded(Struct, frozen=True):
    """Only workers of another model than its output's are there."""

    reason: str


Decided = Placement | Wait | Stranded | Impossible
Key = Callable[[WorkerFacts], tuple[float, ...]]


# --- predictions -----------------------------------------------------------------------------


def with_held(worker: WorkerFacts, held: Held) -> WorkerFacts:
    """Add to the facts of its worker what a sequence left there, which its summary may not tell yet."""
    if worker.uuid != held.uuid:
        return worker
    return msgspec.structs.replace(
        worker,
        matched_tokens=max(worker.matched_tokens, held.num_tokens),
        backlog_tokens=max(0.0, worker.backlog_tokens - held.backlog_tokens),
    )


def cached_tokens(worker: WorkerFacts, job: Job, *, cap_match: bool = True) -> int:
    """Tokens of the prompt that `worker` need not compute or be sent, whole pages.

    Computing always leaves the last token's page over, for its logits; so does receiving with `cap_match`.
    """
    most = job.num_tokens - 1 if cap_match else job.num_tokens
    return min(worker.matched_tokens, most // worker.page_size * worker.page_size)


def prefill_s(worker: WorkerFacts, job: Job) -> float:
    """Time from hand-over to the first token on `worker`: its backlog, then what it lacks."""
    rate = worker.prefill_tokens_per_s or ASSUMED_PREFILL_TOKENS_PER_S
    return (worker.backlog_tokens + job.num_tokens - cached_tokens(worker, job)) / rate


def transfer_s(worker: WorkerFacts, job: Job, bytes_per_s: float, *, cap_match: bool) -> float:
    """Time for the pages that decode worker `worker` lacks to arrive."""
    missing = (
        _pages(job.num_tokens, worker) - cached_tokens(worker, job, cap_match=cap_match) // worker.page_size
    )
    return missing * worker.page_bytes / (bytes_per_s or ASSUMED_TRANSFER_BYTES_PER_S)


def decode_s(worker: WorkerFacts, job: Job) -> float:
    """Time the output takes: a step a token, longer the fuller the batch.

    The step is the worker's median, so its fill is partly in it; counting fill again on top spreads
    sequences before a worker has felt them.
    """
    step = worker.decode_step_s or ASSUMED_DECODE_STEP_S
    return min(job.max_new_tokens, MAX_EXPECTED_TOKENS) * step * (1 + worker.running / worker.max_num_seqs)


def local_s(worker: WorkerFacts, job: Job) -> float:
    """Cost of prefilling where it decodes: the time itself, and what it takes from others.

    While a chunk computes, every running sequence waits for its next token; their waits are counted
    like our own.
    """
    rate = worker.prefill_tokens_per_s or ASSUMED_PREFILL_TOKENS_PER_S
    own = (job.num_tokens - cached_tokens(worker, job)) / rate
    return worker.backlog_tokens / rate + own * (1 + worker.running)


def remote_s(prefill: WorkerFacts, decode: WorkerFacts, job: Job, *, cap_match: bool) -> float:
    """Cost of prefilling on `prefill` for `decode`: time until decode can go on."""
    rate = prefill.transfer_bytes_per_s or decode.transfer_bytes_per_s
    return HAND_OVER_S + prefill_s(prefill, job) + transfer_s(decode, job, rate, cap_match=cap_match)


# --- what can be picked ----------------------------------------------------------------------


def can_begin(worker: WorkerFacts) -> bool:
    """Whether a prompt handed over now begins within about one chunk's time."""
    return worker.backlog_tokens <= worker.chunk_tokens


def has_pages(worker: WorkerFacts, job: Job) -> bool:
    """Whether `worker` can take the sequence into its pages now."""
    lacks = _pages(job.num_tokens + 1, worker) - worker.matched_tokens // worker.page_size
    return worker.free_pages >= lacks


def has_room(worker: WorkerFacts, job: Job) -> bool:
    """Whether `worker` can take the sequence into its batch and its pages now."""
    return worker.running < worker.max_num_seqs and has_pages(worker, job)


def can_ever_hold(worker: WorkerFacts, job: Job) -> bool:
    """Whether the sequence fits an empty `worker`."""
    return _pages(job.num_tokens + 1, worker) <= worker.total_pages


# --- picks -----------------------------------------------------------------------------------


def pick_decode(
    policy: RoutingPolicyName, workers: Sequence[WorkerFacts], job: Job, *, cap_match: bool, turn: int
) -> WorkerFacts | None:
    """Pick where a sequence decodes whose KV comes from elsewhere; None of none."""

    def cost(worker: WorkerFacts) -> tuple[float, ...]:
        moved = transfer_s(worker, job, worker.transfer_bytes_per_s, cap_match=cap_match)
        return (moved + decode_s(worker, job),)

    return _pick(policy, workers, cost, lambda worker: (worker.running / worker.max_num_seqs,), turn)


def pick_local(
    policy: RoutingPolicyName, workers: Sequence[WorkerFacts], job: Job, *, turn: int
) -> WorkerFacts | None:
    """Pick where a sequence is both prefilled and decoded; None of none."""

    def cost(worker: WorkerFacts) -> tuple[float, ...]:
        return (local_s(worker, job) + decode_s(worker, job),)

    def load(worker: WorkerFacts) -> tuple[float, ...]:
        return (worker.running / worker.max_num_seqs, worker.backlog_tokens)

    return _pick(policy, workers, cost, load, turn)


def pick_prefill(
    policy: RoutingPolicyName,
    workers: Sequence[WorkerFacts],
    decode: WorkerFacts,
    job: Job,
    *,
    cap_match: bool,
    turn: int,
) -> WorkerFacts | None:
    """Pick who computes the prompt for `decode`; None of none."""

    def cost(worker: WorkerFacts) -> tuple[float, ...]:
        return (remote_s(worker, decode, job, cap_match=cap_match),)

    return _pick(policy, workers, cost, lambda worker: (worker.backlog_tokens,), turn)


def _pick(
    policy: RoutingPolicyName, workers: Sequence[WorkerFacts], cost: Key, load: Key, turn: int
) -> WorkerFacts | None:
    if not workers:
        return None
    if policy == "round_robin":
        return sorted(workers, key=lambda worker: worker.uuid)[turn % len(workers)]
    keys: dict[str, Key] = {
        "cost": cost,
        "least_load": load,
        "prefix": lambda worker: (-worker.matched_tokens, *load(worker)),
    }
    key = keys[policy]
    return min(workers, key=lambda worker: (key(worker), worker.uuid))


# --- the decision ----------------------------------------------------------------------------


class _Pools(Struct, frozen=True):
    prefill: list[WorkerFacts]
    decode: list[WorkerFacts]
    unified: list[WorkerFacts]


def decide(
    mode: DisaggregateMode,
    policy: RoutingPolicyName,
    workers: Sequence[WorkerFacts],
    job: Job,
    *,
    turn: int = 0,
    is_override: bool = False,
) -> Decided:
    """Place one sequence on ready `workers`.

    Args:
        mode: `always` disaggregates wherever both pools live, `never` does not, `auto` compares.
        policy: How workers are compared within a pool.
        workers: Every ready worker of every role.
        job: What is to be placed.
        turn: Counts placements, for `round_robin`.
        is_override: The mode came with the request; shows in the reason only.
    """
    if job.model_hash is not None:
        same = [w for w in workers if w.model_hash == job.model_hash]
        if _has_decode(workers) and not _has_decode(same):
            return Stranded("no worker of the model that began it is left")
        workers = same
    usable = [w for w in workers if w.uuid not in job.excluded_workers and can_ever_hold(w, job)]
    if workers and not usable:
        return Impossible("no worker can hold a sequence of this length")
    pools = _Pools(
        prefill=[w for w in usable if w.role == "prefill"],
        decode=[w for w in usable if w.role == "decode"],
        unified=[w for w in usable if w.role == "unified"],
    )
    if not pools.decode and not pools.unified:
        if _has_decode(workers):
            return Impossible("no decode worker can take it")
        return Wait("no decode worker is ready")
    prefix = "header: " if is_override else ""
    if mode == "never":
        return _local(policy, pools, job, turn, reason=f"{prefix}never")
    if not pools.decode or not pools.prefill:
        return _undividable(policy, pools, job, turn)
    if mode == "always":
        return _always(policy, pools, job, turn, reason=f"{prefix}always")
    return _auto(policy, pools, job, turn)


def _undividable(policy: RoutingPolicyName, pools: _Pools, job: Job, turn: int) -> Placement | Wait:
    """Place without a choice: one of the two pools is empty."""
    if not pools.prefill and not pools.decode:
        return _local(policy, pools, job, turn, reason="unified")
    missing = "prefill" if not pools.prefill else "decode"
    return _local(policy, pools, job, turn, reason=f"no {missing} worker", is_silent=True)


def _local(
    policy: RoutingPolicyName, pools: _Pools, job: Job, turn: int, *, reason: str, is_silent: bool = False
) -> Placement | Wait:
    candidates = [w for w in (*pools.decode, *pools.unified) if has_room(w, job) and can_begin(w)]
    worker = pick_local(policy, candidates, job, turn=turn)
    if worker is None:
        return Wait("no worker has room")
    predicted = Predicted(local_s=local_s(worker, job), decode_cached_tokens=cached_tokens(worker, job))
    return Placement("local", reason, worker.uuid, None, False, predicted, is_silent)


def _always(
    policy: RoutingPolicyName, pools: _Pools, job: Job, turn: int, *, reason: str
) -> Placement | Wait:
    pair = _pair(policy, pools, job, turn, cap_match=True)
    if pair is not None:
        prefill, decode = pair
        return _remote(prefill, decode, job, reason, cap_match=True)
    if not any(_can_pair(p, d, job) for p in pools.prefill for d in pools.decode):
        return _local(policy, pools, job, turn, reason="no pair can exchange KV", is_silent=True)
    return Wait("no pair has room")


def _auto(policy: RoutingPolicyName, pools: _Pools, job: Job, turn: int) -> Placement | Wait:
    """Compare: KV from elsewhere, or prefill where it decodes, on whichever worker suits each.

    A prefill worker that cannot begin yet takes part with its backlog counted: where waiting for
    it is still the faster way, the sequence waits.
    """
    here = _local(policy, pools, job, turn, reason="local is faster")
    pair = _pair(policy, pools, job, turn, cap_match=False)
    if pair is None:
        pair = _pair(policy, pools, job, turn, cap_match=False, may_queue=True)
    if pair is None:
        return here
    prefill, decode = pair
    there_s = remote_s(prefill, decode, job, cap_match=False)
    if isinstance(here, Wait) or (here.predicted.local_s or 0.0) > there_s:
        if not can_begin(prefill):
            return Wait("prefill workers are busy")
        reason = "no room for local prefill" if isinstance(here, Wait) else "remote is faster"
        placed = _remote(prefill, decode, job, reason, cap_match=False)
    else:
        placed = here
    predicted = Predicted(
        remote_s=there_s,
        local_s=None if isinstance(here, Wait) else here.predicted.local_s,
        prefill_cached_tokens=cached_tokens(prefill, job),
        decode_cached_tokens=placed.predicted.decode_cached_tokens,
    )
    return msgspec.structs.replace(placed, predicted=predicted)


def _pair(
    policy: RoutingPolicyName, pools: _Pools, job: Job, turn: int, *, cap_match: bool, may_queue: bool = False
) -> tuple[WorkerFacts, WorkerFacts] | None:
    """Pick a decode worker with room, then a prefill worker that can begin and reach it."""
    decodes = [w for w in pools.decode if has_room(w, job)]
    prefills = [w for w in pools.prefill if has_pages(w, job) and (may_queue or can_begin(w))]
    while decodes and prefills:
        decode = pick_decode(policy, decodes, job, cap_match=cap_match, turn=turn)
        assert decode is not None
        reachable = [w for w in prefills if _can_pair(w, decode, job)]
        prefill = pick_prefill(policy, reachable, decode, job, cap_match=cap_match, turn=turn)
        if prefill is not None:
            return prefill, decode
        decodes = [w for w in decodes if w.uuid != decode.uuid]
    return None


def _remote(
    prefill: WorkerFacts, decode: WorkerFacts, job: Job, reason: str, *, cap_match: bool
) -> Placement:
    predicted = Predicted(
        remote_s=remote_s(prefill, decode, job, cap_match=cap_match),
        prefill_cached_tokens=cached_tokens(prefill, job),
        decode_cached_tokens=cached_tokens(decode, job, cap_match=cap_match),
    )
    return Placement("disaggregated", reason, decode.uuid, prefill.uuid, cap_match, predicted)


def _can_pair(prefill: WorkerFacts, decode: WorkerFacts, job: Job) -> bool:
    return prefill.kv_terms == decode.kv_terms and (prefill.uuid, decode.uuid) not in job.excluded_pairs


def _has_decode(workers: Sequence[WorkerFacts]) -> bool:
    return any(worker.role != "prefill" for worker in workers)


def _pages(num_tokens: int, worker: WorkerFacts) -> int:
    return -(-num_tokens // worker.page_size)
