"""Router and worker: one ZeroMQ link, DEALER at the router, ROUTER at the worker.

Every request-scoped message carries `(transfer_id, generation)`. The router mints both: the
transfer id names a sequence for its whole life, the generation counts its attempts. A worker
drops a message whose generation is older than the newest it has seen for that transfer id.

A disaggregated sequence, in order:

    router → D  Reserve         D → router  Reserved | Rejected
    router → P  Prefill         P → router  Accepted | Rejected, FirstToken, PrefillDone | Failed
                                D → router  KvReceived, Tokens… (the last one with finish_reason)
    router → both  Release      whatever the outcome; idempotent

A local one: router → D Generate; D → router Accepted | Rejected, Tokens….
"""

from typing import Literal

from msgspec import Struct

from disagg.protocol.peer import KvLayout
from disagg.protocol.sampling import FinishReason, SamplingParams
from disagg.protocol.summary import SummaryDelta, SummaryDigest, SummarySnapshot

Role = Literal["prefill", "decode", "unified"]
WorkerState = Literal["starting", "ready", "draining", "lost"]
RejectReason = Literal[
    "no_pages", "too_long", "draining", "stale", "layout_mismatch", "peer_unreachable", "queue_full"
]


class Hello(Struct, frozen=True, array_like=True, tag="hello"):
    """Router to worker, first on every connection. Answered by Welcome, a SummarySnapshot and Loads."""

    protocol_version: int
    router_id: str
    lease_ttl_s: float


class Welcome(Struct, frozen=True, array_like=True, tag="welcome"):
    """Who this worker is. A new process has a new `uuid`, whatever its address."""

    protocol_version: int
    worker_id: str
    """Stable across restarts: the pod's name, or `decode-0` of `disagg serve`."""
    uuid: str
    role: Role
    state: WorkerState
    model_name: str
    pid: int
    rank_pids: list[int]
    metrics_url: str
    peer_address: str
    """Where another worker reaches this one's control socket."""
    max_model_len: int
    max_num_seqs: int
    max_num_batched_tokens: int
    num_pages: int
    layout: KvLayout
    eos_token_ids: list[int]
    dtype: str
    transport: str
    """What carries KV from or to here, for example `nixl`."""
    model_hash: str = ""
    """Which weights these are; empty where the worker does not say."""
    tokenizer_hash: str = ""
    pod_uid: str = ""
    """The Kubernetes pod that all of its ranks are in, and no other worker; empty where there is none."""


class Reserve(Struct, frozen=True, array_like=True, tag="reserve"):
    """Hold decode pages for one transfer. Answered by Reserved or Rejected.

    `token_ids` are the prompt and, in a replay, the output so far. The worker locks its prefix
    match and takes pages for the rest and for what admission promises of the output.
    """

    transfer_id: str
    generation: int
    ttl_s: float
    token_ids: list[int]
    num_prompt_tokens: int
    """Length of the original prompt; what follows in `token_ids` are output tokens already sent."""
    sampling: SamplingParams
    cache_salt: str = ""
    cap_match: bool = False
    """Leave at least the last page to transfer: the match ends before the last token's page."""


class Reserved(Struct, frozen=True, array_like=True, tag="reserved"):
    """The pages of `token_ids`, in prompt order; those from `first_missing_page` on await KV."""

    transfer_id: str
    generation: int
    first_missing_page: int
    page_ids: list[int]
    """All pages of the prompt, the matched ones first."""
    cached_tokens: int


class Rejected(Struct, frozen=True, array_like=True, tag="rejected"):
    """The worker holds nothing for this attempt."""

    transfer_id: str
    generation: int
    reason: RejectReason
    detail: str = ""


class Target(Struct, frozen=True, array_like=True):
    """Where a prefill worker pushes to."""

    worker_id: str
    uuid: str
    peer_address: str
    first_missing_page: int
    page_ids: list[int]


class Prefill(Struct, frozen=True, array_like=True, tag="prefill"):
    """Compute the prompt, push the missing pages to `target`, sample one token.

    Answered by Accepted or Rejected, later FirstToken, and PrefillDone or Failed. The worker
    posts no write after `deadline_s`.
    """

    transfer_id: str
    generation: int
    ttl_s: float
    deadline_s: float
    token_ids: list[int]
    num_prompt_tokens: int
    sampling: SamplingParams
    target: Target
    cache_salt: str = ""


class Generate(Struct, frozen=True, array_like=True, tag="generate"):
    """Prefill and decode here. Answered by Accepted or Rejected, then Tokens."""

    transfer_id: str
    generation: int
    ttl_s: float
    token_ids: list[int]
    num_prompt_tokens: int
    sampling: SamplingParams
    cache_salt: str = ""


class Abort(Struct, frozen=True, array_like=True, tag="abort"):
    """Stop this attempt and free what it holds.

    A prefill worker answers Fenced once no write of the attempt can still arrive, at once if
    it knows of none. A decode worker keeps the attempt's missing pages until they are fenced.
    """

    transfer_id: str
    generation: int


class Release(Struct, frozen=True, array_like=True, tag="release"):
    """The router needs nothing of this transfer any more. Idempotent; never answered."""

    transfer_id: str
    generation: int


class Fenced(Struct, frozen=True, array_like=True, tag="fenced"):
    """No write of this attempt can still arrive.

    Prefill worker to router, which passes it on to the decode worker that holds the pages.
    """

    transfer_id: str
    generation: int


class Renew(Struct, frozen=True, array_like=True, tag="renew"):
    """Extend every lease of this router at this worker by `ttl_s` from now on the worker's clock."""

    ttl_s: float


class SnapshotRequest(Struct, frozen=True, array_like=True, tag="snapshot_request"):
    """The router saw a gap in the summary; answered by SummarySnapshot."""


class Goodbye(Struct, frozen=True, array_like=True, tag="goodbye"):
    """Either side ends on purpose; a router's leases are released."""

    reason: str = ""


class Accepted(Struct, frozen=True, array_like=True, tag="accepted"):
    """A Prefill or Generate is queued. `cached_tokens` is what this worker's prefix cache held."""

    transfer_id: str
    generation: int
    cached_tokens: int


class FirstToken(Struct, frozen=True, array_like=True, tag="first_token"):
    """A prefill worker's sampled token, sent before the KV has moved."""

    transfer_id: str
    generation: int
    position: int
    """Output position: 0 unless this is a replay."""
    token_id: int
    finish_reason: FinishReason | None
    cached_tokens: int
    queue_s: float
    """From arrival to the first chunk's start."""
    compute_s: float
    """From the first chunk's start to the sampled token."""


class PrefillDone(Struct, frozen=True, array_like=True, tag="prefill_done"):
    """Every write of this attempt has completed at the receiver; also its fence."""

    transfer_id: str
    generation: int
    num_pages: int
    num_bytes: int
    transfer_s: float
    """In which any write was under way, of the slowest rank; gaps between chunks do not count."""
    transport: str


class KvReceived(Struct, frozen=True, array_like=True, tag="kv_received"):
    """Every (prefill rank, decode rank) pair of this attempt has notified; decode has begun."""

    transfer_id: str
    generation: int
    num_pages: int
    bytes_expected: int
    bytes_received: int
    wait_s: float
    """From the grant to the last notification."""
    transport: str


class Failed(Struct, frozen=True, array_like=True, tag="failed"):
    """The attempt ended here without a result; `fenced` says that no write can still arrive."""

    transfer_id: str
    generation: int
    reason: str
    fenced: bool


class SequenceTokens(Struct, frozen=True, array_like=True):
    """New tokens of one sequence. The router drops positions that it has already seen."""

    transfer_id: str
    generation: int
    position: int
    """Output position of `token_ids[0]`."""
    token_ids: list[int]
    finish_reason: FinishReason | None = None
    cached_tokens: int | None = None
    """With a local sequence's first tokens: what the prefix cache held."""


class Tokens(Struct, frozen=True, array_like=True, tag="tokens"):
    """What one step of a worker made for one router."""

    sequences: list[SequenceTokens]


class Load(Struct, frozen=True, array_like=True, tag="load"):
    """The worker's state, twice a second when it is busy or idle, and at once on a change of state."""

    state: WorkerState
    running: int
    waiting: int
    leases: int
    queued_tokens: int
    """Prompt tokens accepted and not yet computed."""
    pages_total: int
    pages_free: int
    pages_cached: int
    pages_in_use: int
    prefill_tokens_per_s: float
    """Measured over recent steps; 0 before the first."""
    decode_step_s: float
    """Median duration of recent decode steps; 0 before the first."""
    transfer_bytes_per_s: float = 0.0


ToWorker = Hello | Reserve | Prefill | Generate | Abort | Release | Fenced | Renew | SnapshotRequest | Goodbye
FromWorker = (
    Welcome
    | Reserved
    | Rejected
    | Accepted
    | FirstToken
    | PrefillDone
    | KvReceived
    | Failed
    | Fenced
    | Tokens
    | Load
    | SummaryDelta
    | SummarySnapshot
    | SummaryDigest
    | Goodbye
)
