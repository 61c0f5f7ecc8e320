"""Estimates how many prompt tokens a worker still has to compute, between its Loads.

A Load is exact and old: twice a second, while a GPU computes a chunk in less. In between, what we
hand over is added, and what it computes is taken off at its measured rate. Prompts of ours that
have not had their first token, and what others had queued, bound the estimate from above: a
worker that has measured no rate yet, or tells it too low, is not taken for busy when it is done.
"""

MAX_SILENT_DECAY_S = 1.0
"""A worker that has told nothing for longer is not credited with more progress."""


class Backlog:
    """Prompt tokens of one worker, accepted or on the way there. Times are the caller's clock."""

    def __init__(self) -> None:
        self._queued = 0.0
        self._at = 0.0
        self._rate = 0.0
        self._unanswered = 0
        self._ours = 0
        self._others = 0

    def tokens(self, now: float) -> float:
        """Estimate what is still to be computed."""
        return self._unanswered + min(self._left(now), self._ours + self._others)

    @property
    def ours(self) -> int:
        """Tokens of prompts of this router alone, sent or accepted and without a first token."""
        return self._unanswered + self._ours

    def on_load(self, queued_tokens: int, prefill_tokens_per_s: float, now: float) -> None:
        """Believe the worker. What it has not answered yet it may not have counted."""
        self._queued, self._at, self._rate = float(queued_tokens), now, prefill_tokens_per_s
        self._others = max(0, queued_tokens - self._ours)

    def on_sent(self, num_tokens: int) -> None:
        """Count a prompt that is on its way."""
        self._unanswered += num_tokens

    def on_answered(self, sent_tokens: int, new_tokens: int, now: float) -> None:
        """Settle a prompt that `on_sent` counted: `new_tokens` of it were accepted."""
        self._unanswered -= sent_tokens
        self._queued, self._at = self._left(now) + new_tokens, now
        self._ours += new_tokens

    def on_refused(self, sent_tokens: int) -> None:
        """Forget a prompt that `on_sent` counted."""
        self._unanswered -= sent_tokens

    def on_computed(self, new_tokens: int) -> None:
        """Take off a prompt that `on_answered` counted: it has its first token, or was given up."""
        self._ours -= new_tokens

    def _left(self, now: float) -> float:
        elapsed = min(max(0.0, now - self._at), MAX_SILENT_DECAY_S)
        return max(0.0, self._queued - elapsed * self._rate)
