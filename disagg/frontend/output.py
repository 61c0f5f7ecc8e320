"""What one sequence has said so far: text, counts, and why it ended."""

from typing import Literal

from disagg.errors import WorkerError
from disagg.frontend.detokenizer import Detokenizer
from disagg.frontend.generator import Delta
from disagg.frontend.stops import StopMatcher

Finish = Literal["stop", "length"]


class SequenceOutput:
    """One choice of an answer. Feed it deltas; take the text out when it suits."""

    __slots__ = ("_detokenizer", "_stops", "_text", "cached_tokens", "completion_tokens", "finish", "index")

    def __init__(self, index: int, detokenizer: Detokenizer, stops: StopMatcher | None) -> None:
        self.index = index
        self.completion_tokens = 0
        """Tokens of output, the one that ended it counted; none after a stop string."""
        self.cached_tokens: int | None = None
        self.finish: Finish | None = None
        self._detokenizer = detokenizer
        self._stops = stops
        self._text = ""

    def add(self, delta: Delta) -> bool:
        """Take more tokens; True when a stop string ended the sequence, which the router cannot know.

        Raises:
            WorkerError: The sequence ended otherwise than a client can be told of as an answer.
        """
        if delta.cached_tokens is not None:
            self.cached_tokens = delta.cached_tokens
        if self._stops is not None:
            if self._add_until_stop(self._stops, delta.token_ids):
                return True
        else:
            self.completion_tokens += len(delta.token_ids)
            self._text += self._detokenizer.push(delta.token_ids)
        if delta.finish_reason is not None:
            return self._end(delta.finish_reason)
        return False

    def take_text(self) -> str:
        """Give out the text that has come since the last call."""
        text, self._text = self._text, ""
        return text

    def _add_until_stop(self, stops: StopMatcher, token_ids: list[int]) -> bool:
        # One by one, so that the count ends at the same token however many arrive together.
        for token_id in token_ids:
            self.completion_tokens += 1
            text, found = stops.push(self._detokenizer.push([token_id]))
            self._text += text
            if found:
                self.finish = "stop"
                return True
        return False

    def _end(self, reason: str) -> bool:
        if reason != "stop" and reason != "length":
            raise WorkerError(f"sequence {self.index} ended as {reason}")
        rest, found = self._detokenizer.flush(), False
        if self._stops is not None:
            rest, found = self._stops.push(rest)
            if found:
                reason = "stop"
            else:
                rest += self._stops.flush()
        self._text += rest
        self.finish = reason  # type: ignore[assignment]  # narrowed above, but for mypy
        return found
