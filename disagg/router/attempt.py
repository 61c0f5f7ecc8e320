"""One attempt at a sequence: where it runs and how far it has come. Facts alone; `sequence.py` acts."""

from typing import Literal

from disagg.protocol import FinishReason, Generate, Prefill, Reserve, Reserved, SequenceTokens, Target
from disagg.protocol import SamplingParams as Sampling
from disagg.router.policy import Placement
from disagg.router.registry import Worker

Stage = Literal["reserve", "prefill", "transfer", "decode", "local"]
"""How far an attempt is: asking for pages, computing the prompt, its KV under way, decoding; or local."""
Writer = Literal["none", "open", "fenced"]
"""Whether a prefill worker may still write into decode pages of this attempt."""


class Attempt:
    """One generation of a sequence. `decode` and `prefill` are None once that side is gone or let go."""

    __slots__ = (
        "accepted_tokens",
        "base",
        "deadline_at",
        "decode",
        "early",
        "finish",
        "first_at",
        "generation",
        "has_first",
        "has_kv",
        "placement",
        "prefill",
        "prefill_done",
        "promised_pages",
        "sent_at",
        "sent_tokens",
        "token_ids",
        "writer",
    )

    def __init__(
        self,
        generation: int,
        placement: Placement,
        decode: Worker,
        prefill: Worker | None,
        token_ids: list[int],
        base: int,
        now: float,
    ) -> None:
        self.generation = generation
        self.placement = placement
        self.decode: Worker | None = decode
        self.prefill = prefill
        self.token_ids = token_ids
        """Prompt, and in a replay the output that the client has."""
        self.base = base
        """Output tokens among them: the position of the first token that this attempt makes."""
        self.deadline_at = 0.0
        """When what is awaited next has taken too long."""
        self.sent_at = now
        """When the prompt was handed to who computes it."""
        self.first_at: float | None = None
        self.has_first = prefill is None
        """A local attempt's tokens all come from one place."""
        self.has_kv = False
        self.prefill_done = False
        self.writer: Writer = "none"
        self.finish: FinishReason | None = None
        """Its first token was its last: only the KV is awaited."""
        self.early: list[SequenceTokens] = []
        """Decode's tokens that overtook prefill's first one, which came by another link."""
        self.promised_pages = 0
        self.sent_tokens = 0
        """Counted in the computing worker's backlog as under way."""
        self.accepted_tokens = 0
        """Counted there as accepted."""

    @property
    def is_local(self) -> bool:
        """Whether one worker does both."""
        return self.placement.prefill_uuid is None

    @property
    def stage(self) -> Stage:
        """How far it is."""
        if self.is_local:
            return "local"
        if self.has_kv:
            return "decode"
        if self.writer == "none":
            return "reserve"
        return "transfer" if self.has_first else "prefill"

    @property
    def computing(self) -> Worker | None:
        """Who computes the prompt."""
        return self.decode if self.is_local else self.prefill


def make_reserve(
    attempt: Attempt, transfer_id: str, num_prompt_tokens: int, sampling: Sampling, salt: str, ttl_s: float
) -> Reserve:
    """Ask the decode worker for pages."""
    return Reserve(
        transfer_id,
        attempt.generation,
        ttl_s,
        attempt.token_ids,
        num_prompt_tokens,
        sampling,
        salt,
        attempt.placement.cap_match,
    )


def make_generate(
    attempt: Attempt, transfer_id: str, num_prompt_tokens: int, sampling: Sampling, salt: str, ttl_s: float
) -> Generate:
    """Ask one worker for everything."""
    return Generate(
        transfer_id, attempt.generation, ttl_s, attempt.token_ids, num_prompt_tokens, sampling, salt
    )


def make_prefill(
    attempt: Attempt,
    reserved: Reserved,
    num_prompt_tokens: int,
    sampling: Sampling,
    salt: str,
    *,
    ttl_s: float,
    deadline_s: float,
) -> Prefill:
    """Ask the prefill worker to compute the prompt and push what was reserved."""
    assert attempt.decode is not None
    assert attempt.decode.welcome is not None
    welcome = attempt.decode.welcome
    target = Target(
        welcome.worker_id,
        welcome.uuid,
        welcome.peer_address,
        reserved.first_missing_page,
        reserved.page_ids,
    )
    return Prefill(
        reserved.transfer_id,
        attempt.generation,
        ttl_s,
        deadline_s,
        attempt.token_ids,
        num_prompt_tokens,
        sampling,
        target,
        salt,
    )
