"""How tokens are drawn and when a sequence ends."""

from typing import Literal

from msgspec import Struct

from disagg.errors import InvalidRequest

FinishReason = Literal["stop", "length", "abort", "error", "handed_back"]
"""`stop`: an end or stop token. `handed_back`: the worker ran out of pages, the router replays it."""


class SamplingParams(Struct, frozen=True, array_like=True, kw_only=True):
    """What one sequence asks of the sampler; the router has checked and completed it.

    A draw depends on (`seed`, `choice_index`, output position) alone, never on the batch.
    Stop strings are the frontend's business, the engine knows tokens only.
    """

    max_tokens: int = 16
    """Tokens of output in all, counted from the end of the original prompt."""
    temperature: float = 1.0
    """0 is greedy."""
    top_p: float = 1.0
    top_k: int = 0
    """Keep the k likeliest tokens; 0 keeps all."""
    min_p: float = 0.0
    """Drop tokens less likely than this share of the likeliest."""
    seed: int = 0
    """Unsigned 64 bits; the router mints one where the client sent none."""
    choice_index: int = 0
    stop_token_ids: tuple[int, ...] = ()
    """End the sequence besides the model's own end tokens."""
    ignore_eos: bool = False

    def check(self) -> "SamplingParams":
        """Return self, or raise `InvalidRequest` that names the first field out of range."""
        rules: tuple[tuple[str, object, bool, str], ...] = (
            ("max_tokens", self.max_tokens, self.max_tokens >= 1, "must be at least 1"),
            ("temperature", self.temperature, 0 <= self.temperature <= 2, "must be between 0 and 2"),
            ("top_p", self.top_p, 0 < self.top_p <= 1, "must be above 0 and at most 1"),
            ("top_k", self.top_k, self.top_k >= 0, "must be at least 0"),
            ("min_p", self.min_p, 0 <= self.min_p <= 1, "must be between 0 and 1"),
            ("seed", self.seed, 0 <= self.seed < 2**64, "must fit 64 bits unsigned"),
        )
        for name, value, holds, rule in rules:
            if not holds:
                raise InvalidRequest(f"{name} {rule}, got {value}", param=name)
        return self
