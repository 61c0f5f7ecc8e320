"""Turn tokens into text as they come, so that the pieces joined are the whole decoded at once.

A character may be spread over tokens: its bytes wait until it is complete. What never becomes
valid UTF-8 comes out as U+FFFD, as it does when decoded whole.
"""

from codecs import utf_8_decode
from typing import Protocol

from tokenizers import Tokenizer as HfTokenizer


class Detokenizer(Protocol):
    """The state of one sequence."""

    def push(self, token_ids: list[int]) -> str:
        """Take more tokens; return the text that is certain now."""

    def flush(self) -> str:
        """Return what waits for more bytes, which will not come."""


class ByteDetokenizer:
    """For byte-level vocabularies, where a token is a run of bytes whatever stands before it."""

    __slots__ = ("_pending", "_table")

    def __init__(self, table: list[bytes]) -> None:
        """Share `table`: the bytes of each token id, empty for special tokens."""
        self._table = table
        self._pending = b""

    def push(self, token_ids: list[int]) -> str:
        """Take more tokens; return the text that is certain now."""
        table = self._table
        try:
            new = b"".join([table[token_id] for token_id in token_ids])
        except IndexError:
            # Embeddings are often padded past the vocabulary; such a token has no text.
            new = b"".join([table[token_id] for token_id in token_ids if token_id < len(table)])
        pending = self._pending + new
        text, used = utf_8_decode(pending, "replace")
        self._pending = pending[used:]
        return text

    def flush(self) -> str:
        """Return what waits for more bytes, which will not come."""
        pending, self._pending = self._pending, b""
        return pending.decode("utf-8", "replace")


class ContextDetokenizer:
    """For every other vocabulary, where a token's text may depend on the one before it.

    Decodes a window twice, without and with the new tokens, and returns the difference. The
    window starts at the tokens that gave the last piece, so a step costs its own length only.

    Where a vocabulary spells characters in byte tokens, decoding whole loses a whole run of them if
    one character in it is broken. Here only that character is: the others have been sent by then.
    """

    __slots__ = ("_ids", "_read", "_tokenizer")

    def __init__(self, tokenizer: HfTokenizer) -> None:
        self._tokenizer = tokenizer
        self._ids: list[int] = []
        self._read = 0

    def push(self, token_ids: list[int]) -> str:
        """Take more tokens; return the text that is certain now."""
        self._ids += token_ids
        return self._advance(final=False)

    def flush(self) -> str:
        """Return what waits for more bytes, which will not come."""
        return self._advance(final=True)

    def _advance(self, final: bool) -> str:
        before = self._tokenizer.decode(self._ids[: self._read])
        after = self._tokenizer.decode(self._ids)
        if len(after) <= len(before) or (after.endswith("\ufffd") and not final):
            return ""
        self._ids = self._ids[self._read :]
        self._read = len(self._ids)
        return after[len(before) :]
