"""One sequence on its way through the engine."""

from enum import Enum, auto
from typing import Any

import numpy as np

from disagg.engine.request import EngineRequest
from disagg.kv.prefix import NO_PAGES, PageIds, Tokens
from disagg.protocol import FinishReason

PROGRESS = np.dtype(
    [
        ("num_tokens", np.int64),
        ("num_computed", np.int64),
        ("num_planned", np.int64),
        ("num_pages", np.int64),
        ("last_step", np.int64),
        ("num_prompt_tokens", np.int64),
        ("limit_tokens", np.int64),
        ("order", np.int64),
        ("is_decoding", np.bool_),
    ]
)
"""What steps read and write of a sequence; see the fields of that name in `Sequence`."""


class _Progress:
    """A field of a sequence's PROGRESS record."""

    def __set_name__(self, owner: type, name: str) -> None:
        self._name = name

    def __get__(self, sequence: "Sequence", owner: type) -> int:
        return int(sequence.progress[self._name])

    def __set__(self, sequence: "Sequence", value: int) -> None:
        sequence.progress[self._name] = value


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

    While the sequence has a slot, `progress`, `tokens` and `pages` are views of the slot table's
    rows, so that a step reads and writes those of all its sequences at once.

    Invariants: `num_computed <= num_planned`, and the token at `num_planned` is known or will be
    sampled by a step in flight; pages `[0, num_committed)` belong to the prefix cache and are locked
    through `node`, pages `[num_committed, num_pages)` are this sequence's own.
    """

    num_tokens = _Progress()
    num_computed = _Progress()
    num_planned = _Progress()
    num_pages = _Progress()
    last_step = _Progress()
    """The newest plan that this sequence is part of."""
    num_prompt_tokens = _Progress()
    limit_tokens = _Progress()
    """Prompt and output together never exceed this."""
    order = _Progress()
    """Age: the highest is the youngest."""

    __slots__ = (
        "added_at",
        "cached_tokens",
        "node",
        "num_committed",
        "num_offered",
        "pages",
        "progress",
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
        self.stop_ids = stop_ids
        """Tokens that end the sequence."""
        self.progress: Any = np.zeros((), PROGRESS)
        self.num_prompt_tokens = request.num_prompt_tokens
        self.limit_tokens = limit_tokens
        self.order = order
        self.num_tokens = len(request.token_ids)
        # With room for the token that starts a reservation.
        self.tokens: Tokens = np.array([*request.token_ids, 0], np.int32)
        self.pages: PageIds = NO_PAGES
        self.num_committed = 0
        self.num_offered = 0
        """Full pages that the prefix cache has been offered; it may have kept fewer."""
        self.node: int | None = None
        """The lock on the committed pages; None before the sequence has begun."""
        self.slot: int | None = None
        self.cached_tokens = 0
        self.added_at = added_at
        self.started_at = 0.0

    @property
    def position(self) -> int:
        """Output position of the next token to become known."""
        return self.num_tokens - self.num_prompt_tokens

    @property
    def private_pages(self) -> PageIds:
        """The pages that are this sequence's own."""
        return self.pages[self.num_committed : self.num_pages]

    def append(self, token_id: int) -> None:
        """Learn the next token."""
        self.tokens[self.num_tokens] = token_id
        self.num_tokens += 1

    @property
    def end_reason(self) -> FinishReason | None:
        """Whether and why the sequence ends with its newest token."""
        if int(self.tokens[self.num_tokens - 1]) in self.stop_ids:
            return "stop"
        return "length" if self.num_tokens >= self.limit_tokens else None
