"""One sequence on its way through the engine."""

from enum import Enum, auto

import numpy as np
from numpy.typing import NDArray

from disagg.engine.request import EngineRequest
from disagg.kv.prefix import NO_PAGES, PageIds


class State(Enum):
    """Where a sequence stands. Only PREFILLING and DECODING ones are planned into steps."""

    WAITING = auto()
    """Queued; holds no pages."""
    RESERVED = auto()
    """Holds pages that await KV from elsewhere."""
    READY = auto()
    """Its KV has landed and it waits for a slot."""
    PREFILLING = auto()
    DECODING = auto()
    """Every token but the newest is computed, or will be by a step in flight."""
    LAST_CHUNK = auto()
    """A prefill_only sequence whose last chunk is in flight."""
    HELD = auto()
    """Stopped, with its pages kept until they are released."""
    ENDED = auto()
    """Known to nobody but to steps in flight."""


class Sequence:
    """State of one request: what is known, what is computed, and the pages that hold it.

    `num_computed` is the request's whole progress: prefix hit, chunk, decode and replay all
    advance it. It counts retired steps; `num_planned` also those in flight.

    Invariants: `num_computed <= num_planned < num_tokens + num_pending`; pages
    `[0, num_committed)` belong to the prefix cache and are locked through `node`, pages
    `[num_committed, num_pages)` are this sequence's own.
    """

    __slots__ = (
        "added_at",
        "cached_tokens",
        "last_step",
        "limit_tokens",
        "node",
        "num_committed",
        "num_computed",
        "num_offered",
        "num_pages",
        "num_pending",
        "num_planned",
        "num_tokens",
        "order",
        "pages",
        "request",
        "slot",
        "started_at",
        "state",
        "stop_ids",
        "tokens",
    )

    def __init__(
        self,
        request: EngineRequest,
        *,
        state: State,
        limit_tokens: int,
        stop_ids: frozenset[int],
        order: int,
        added_at: float,
    ) -> None:
        self.request = request
        self.state = state
        self.limit_tokens = limit_tokens
        """Prompt and output together never exceed this."""
        self.stop_ids = stop_ids
        """Tokens that end the sequence."""
        self.order = order
        """Age: the highest is the youngest."""
        self.num_tokens = len(request.token_ids)
        self.tokens: NDArray[np.int32] = np.empty(max(limit_tokens, self.num_tokens), np.int32)
        self.tokens[: self.num_tokens] = request.token_ids
        self.num_computed = 0
        self.num_planned = 0
        self.num_pending = 0
        """Tokens that steps in flight will sample."""
        self.pages: PageIds = NO_PAGES
        """Page row; while the sequence has a slot, a view of the slot table's row."""
        self.num_pages = 0
        self.num_committed = 0
        self.num_offered = 0
        """Full pages that the prefix cache has been offered; it may have kept fewer."""
        self.node: int | None = None
        """The lock on the committed pages; None before the sequence has begun."""
        self.slot: int | None = None
        self.last_step = 0
        """The newest plan that this sequence is part of."""
        self.cached_tokens = 0
        self.added_at = added_at
        self.started_at = 0.0

    @property
    def position(self) -> int:
        """Output position of the next token to become known."""
        return self.num_tokens - self.request.num_prompt_tokens

    @property
    def private_pages(self) -> PageIds:
        """The pages that are this sequence's own."""
        return self.pages[self.num_committed : self.num_pages]

    @property
    def can_plan_decode(self) -> bool:
        """Whether the step after those in flight may still add a token."""
        return self.num_planned + 1 < self.limit_tokens
