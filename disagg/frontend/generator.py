"""The seam below the OpenAI surface: what the frontend asks for, and what comes back.

The router implements `Generator`; the tests do with a clock. Tokens go up, never text: the
frontend owns tokenizing, detokenizing and stop strings.
"""

from collections.abc import AsyncIterator
from types import TracebackType
from typing import Any, Literal, Protocol, Self

from msgspec import Struct

from disagg.errors import DisaggError
from disagg.protocol import FinishReason, SamplingParams

DecisionOverride = Literal["always", "never"]


class GenerateRequest(Struct, frozen=True):
    """One HTTP request, checked and completed.

    Its sequences are numbered `prompt * n + choice`. `sampling` has `choice_index` 0 and a seed;
    the router gives sequence `i` the choice index `i % n`.
    """

    request_id: str
    client_request_id: str | None
    prompts: list[list[int]]
    """Token ids, at least one a prompt."""
    n: int
    sampling: SamplingParams
    decision_override: DecisionOverride | None
    cache_salt: str = ""


class Delta(Struct):
    """New tokens of one sequence. The last one of a sequence has a finish reason, and maybe no tokens."""

    index: int
    """Sequence index."""
    token_ids: list[int]
    finish_reason: FinishReason | None
    cached_tokens: int | None
    """With a sequence's first delta: prompt tokens that the worker which computed it had cached."""


class Ticket(Protocol):
    """A running request. Iterate it inside its `async with`; it ends when every sequence has."""

    async def __aenter__(self) -> Self:
        """Hold the request."""

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
        /,
    ) -> bool | None:
        """Abort what still runs; the ledger says `abort` for it. Never waits for a worker."""

    def __aiter__(self) -> AsyncIterator[list[Delta]]:
        """Yield what is waiting as one batch, in order.

        Raises:
            WorkerError: No worker is left to try.
        """

    def stop_sequence(self, index: int, completion_tokens: int) -> None:
        """End one sequence at a stop string, after `completion_tokens`. No delta follows.

        The ledger counts and says `stop` as the client is told, also where the worker had gone on or ended.
        """


class Generator(Protocol):
    """Everything the frontend needs to know of what runs models."""

    async def submit(self, request: GenerateRequest) -> Ticket:
        """Queue a request. Its record is in the ledger from then on, also where this raises.

        Raises:
            RequestError: It cannot be served, for example `Overloaded` or `PromptTooLong`.
            WorkerError: No worker is there to serve it.
        """

    def max_model_len(self, model: str) -> int:
        """Longest prompt plus output of a served model, tokens."""

    def healthy(self) -> bool:
        """Whether a decode or unified worker can serve, and this process is not draining."""

    def workers(self) -> list[dict[str, Any]]:
        """Body of `/disagg/workers`."""

    def records(self, limit: int) -> list[dict[str, Any]]:
        """Newest ledger records first."""

    async def record(self, request_id: str) -> dict[str, Any] | None:
        """One ledger record, or None where nobody has it."""

    def metrics(self) -> bytes:
        """Body of `/metrics`, Prometheus text."""

    def note_rejected(self, request_id: str, client_request_id: str | None, error: DisaggError) -> None:
        """Put a request that was answered with an error, and never submitted, in the ledger."""
