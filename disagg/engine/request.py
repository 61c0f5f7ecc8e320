"""What goes into an engine and what comes out: records only."""

from typing import Literal

from msgspec import Struct

from disagg.protocol import FinishReason, SamplingParams

RefusedReason = Literal["too_long", "no_pages", "queue_full", "invalid"]
"""`too_long` and `invalid` never fit here; `no_pages` and `queue_full` may fit later."""


class EngineRequest(Struct, frozen=True, kw_only=True):
    """One sequence to compute.

    `token_ids` are the original prompt and, in a replay, the output so far. Output positions
    and `sampling.max_tokens` count from the end of the original prompt.
    """

    request_id: str
    token_ids: list[int]
    num_prompt_tokens: int
    sampling: SamplingParams
    cache_salt: str = ""
    prefill_only: bool = False
    """Compute the prompt and sample one token; keep the pages until `Engine.release`."""


class Added(Struct, frozen=True):
    """The request waits for its turn; it holds no pages yet."""

    request_id: str


class Refused(Struct, frozen=True):
    """The engine holds nothing for this request."""

    reason: RefusedReason
    detail: str = ""


class Reservation(Struct, frozen=True):
    """Pages of a prompt whose KV comes from elsewhere; those from `first_missing_page` on await it."""

    request_id: str
    first_missing_page: int
    page_ids: list[int]
    """All pages of `token_ids`, in order, the matched ones first."""
    cached_tokens: int


class SequenceOutput(Struct, frozen=True, kw_only=True, gc=False):
    """New tokens of one sequence, or its end."""

    request_id: str
    position: int
    """Output position of `token_ids[0]`, or of the next token where there is none."""
    token_ids: list[int]
    finish_reason: FinishReason | None = None
    cached_tokens: int | None = None
    """With a sequence's first tokens, unless its KV came from elsewhere: what the prefix cache held."""
    queue_s: float = 0.0
    """With `cached_tokens`: from `add` to the first chunk's start."""
    compute_s: float = 0.0
    """With `cached_tokens`: from the first chunk's start to this token."""


class ChunkDone(Struct, frozen=True, kw_only=True):
    """A chunk of a `prefill_only` request has been computed.

    Comes after the SequenceOutput of the same request in the step where `is_last` is set.
    """

    request_id: str
    num_computed: int
    page_ids: list[int]
    """Every page of the prompt that is complete, from its start; with `is_last` the partial one too."""
    is_last: bool


Event = SequenceOutput | ChunkDone


class StepOutput(Struct, frozen=True, kw_only=True):
    """What one step did."""

    events: list[Event]
    num_prefill_tokens: int = 0
    num_decode_tokens: int = 0
    step_s: float = 0.0


class EngineStats(Struct, frozen=True, kw_only=True):
    """The engine's state now, and totals since its start."""

    running: int
    """Sequences that take part in steps, or will as soon as there is a slot."""
    waiting: int
    reserved: int
    held: int
    """Finished `prefill_only` requests whose pages await release."""
    queued_tokens: int
    """Prompt tokens accepted and not yet computed."""
    pages_total: int
    pages_free: int
    pages_cached: int
    pages_in_use: int
    pages_quarantined: int
    """Of those in use."""
    prefill_tokens_per_s: float
    decode_step_s: float
    num_steps: int
    num_prompt_tokens: int
    """Prompt tokens of sequences that began here, cached ones included."""
    num_cached_tokens: int
    """Of those, the ones that the prefix cache held."""
    num_output_tokens: int
    num_handed_back: int
