"""Find stop strings in text that arrives in pieces.

What comes out does not depend on how the text was cut: the match that ends first wins, among
those that end together the longest. Text that may still become a match is held back.
"""

from typing import Self

from msgspec import Struct


class StopString(Struct, frozen=True):
    """A stop string with its failure table (Knuth, Morris, Pratt): linear in the text, whatever it is."""

    text: str
    failure: tuple[int, ...]
    """`failure[i]`: length of the longest proper prefix of `text` that ends at `i`."""

    @classmethod
    def of(cls, text: str) -> Self:
        """Build the table. Requires: `text` is not empty."""
        failure = [0] * len(text)
        matched = 0
        for position in range(1, len(text)):
            while matched and text[matched] != text[position]:
                matched = failure[matched - 1]
            matched += text[matched] == text[position]
            failure[position] = matched
        return cls(text, tuple(failure))


class StopMatcher:
    """The state of one sequence."""

    __slots__ = ("_held", "_matched", "_stops")

    def __init__(self, stops: tuple[StopString, ...]) -> None:
        self._stops = stops
        self._matched = [0] * len(stops)
        self._held = ""

    def push(self, text: str) -> tuple[str, bool]:
        """Take more text; return what can be sent, and whether a stop string was found after it."""
        buffer = self._held + text
        end = len(self._held)
        for char in text:
            end += 1
            found = self._step(char)
            if found:
                self._held = ""
                return buffer[: end - found], True
        safe = len(buffer) - max(self._matched, default=0)
        self._held = buffer[safe:]
        return buffer[:safe], False

    def flush(self) -> str:
        """Give up what was held back: the text has ended."""
        held, self._held = self._held, ""
        return held

    def _step(self, char: str) -> int:
        """Advance every table by one character; the length of the longest match that ends with it, or 0."""
        found = 0
        for index, stop in enumerate(self._stops):
            matched = self._matched[index]
            while matched and stop.text[matched] != char:
                matched = stop.failure[matched - 1]
            matched += stop.text[matched] == char
            if matched == len(stop.text):
                found = max(found, matched)
            self._matched[index] = matched
        return found
