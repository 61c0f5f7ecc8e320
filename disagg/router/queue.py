"""The queue of sequences that cannot begin yet: first come first served, those that had begun first.

Bounded by prompt tokens. What has begun once was let in already and is never turned away.
"""

from collections import OrderedDict

from disagg.errors import Overloaded
from disagg.router.sequence import Sequence

MIN_RETRY_AFTER_S = 1.0
MAX_RETRY_AFTER_S = 60.0


class WaitQueue:
    """Adding, removing anywhere and looking at the head cost the same at any length."""

    def __init__(self, max_tokens: int) -> None:
        self._max_tokens = max_tokens
        self._again: OrderedDict[str, Sequence] = OrderedDict()
        self._new: OrderedDict[str, Sequence] = OrderedDict()
        self.num_tokens = 0
        """Prompt tokens of those that have not begun."""

    def __len__(self) -> int:
        return len(self._again) + len(self._new)

    def check_room(self, num_tokens: int, tokens_per_s: float) -> None:
        """Raise `Overloaded` where `num_tokens` more would be too many.

        Whoever finds nobody waiting is let in, however long the prompt. `tokens_per_s` is what
        workers compute, for the time to come back; 0 where unknown.
        """
        if not self._new or self.num_tokens + num_tokens <= self._max_tokens:
            return
        excess = self.num_tokens + num_tokens - self._max_tokens
        wait_s = excess / tokens_per_s if tokens_per_s > 0 else MIN_RETRY_AFTER_S
        raise Overloaded(
            f"{self.num_tokens} prompt tokens are waiting, at most {self._max_tokens} may",
            retry_after_s=min(max(wait_s, MIN_RETRY_AFTER_S), MAX_RETRY_AFTER_S),
        )

    def add(self, sequence: Sequence) -> None:
        """Append one that has not begun."""
        self._new[sequence.transfer_id] = sequence
        self.num_tokens += len(sequence.prompt)

    def add_again(self, sequence: Sequence) -> None:
        """Add one that has begun, behind others that have."""
        self._again[sequence.transfer_id] = sequence

    def head(self) -> Sequence | None:
        """Return who is next."""
        return next(iter(self._again.values()), None) or next(iter(self._new.values()), None)

    def remove(self, sequence: Sequence) -> None:
        """Take one out, wherever it is; nothing happens where it is not here."""
        if self._again.pop(sequence.transfer_id, None) is not None:
            return
        if self._new.pop(sequence.transfer_id, None) is not None:
            self.num_tokens -= len(sequence.prompt)

    def all(self) -> list[Sequence]:
        """Everyone, in order."""
        return [*self._again.values(), *self._new.values()]
