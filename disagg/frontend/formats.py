"""The JSON of answers, whole and as server-sent events.

An event is built from bytes made once a request with only the escaped text between them: a
token that arrives alone costs a few microseconds here.
"""

from collections.abc import Sequence
from typing import Any, Final, Protocol

import msgspec

from disagg.frontend.output import SequenceOutput

DONE: Final = b"data: [DONE]\n\n"

_encode = msgspec.json.Encoder().encode


class Usage(msgspec.Struct, frozen=True):
    """Tokens of a request: each prompt once, every choice's output."""

    prompt_tokens: int
    completion_tokens: int
    cached_tokens: int

    def to_json(self) -> dict[str, Any]:
        """As OpenAI has it; `cached_tokens` also when it is 0."""
        return {
            "prompt_tokens": self.prompt_tokens,
            "completion_tokens": self.completion_tokens,
            "total_tokens": self.prompt_tokens + self.completion_tokens,
            "prompt_tokens_details": {"cached_tokens": self.cached_tokens},
        }


class Format(Protocol):
    """One endpoint's shape, made for one request."""

    def text_event(self, index: int, text: str) -> bytes:
        """More text of a choice; its first event carries what must come first."""

    def finish_event(self, index: int, finish: str) -> bytes:
        """The end of a choice."""

    def usage_event(self, usage: Usage) -> bytes:
        """The usage, after all choices."""

    def whole(self, outputs: Sequence[SequenceOutput], usage: Usage) -> bytes:
        """The answer of a request that does not stream."""


class ChatFormat:
    """`/v1/chat/completions`."""

    def __init__(self, request_id: str, model: str, created: int, include_usage: bool) -> None:
        self._head: dict[str, Any] = {
            "id": f"chatcmpl-{request_id}",
            "object": "chat.completion.chunk",
            "created": created,
            "model": model,
        }
        self._open, self._close = _frame(self._head, include_usage)
        self._begun: set[int] = set()

    def text_event(self, index: int, text: str) -> bytes:
        """More text of a choice, its role before the first."""
        event = b'%b%d,"delta":{"content":%b},"logprobs":null,"finish_reason":null%b' % (
            self._open,
            index,
            _encode(text),
            self._close,
        )
        return event if index in self._begun else self._role_event(index) + event

    def finish_event(self, index: int, finish: str) -> bytes:
        """The end of a choice."""
        event = b'%b%d,"delta":{},"logprobs":null,"finish_reason":"%b"%b' % (
            self._open,
            index,
            finish.encode(),
            self._close,
        )
        return event if index in self._begun else self._role_event(index) + event

    def usage_event(self, usage: Usage) -> bytes:
        """The usage, after all choices."""
        return _usage_event(self._head, usage)

    def whole(self, outputs: Sequence[SequenceOutput], usage: Usage) -> bytes:
        """The answer of a request that does not stream."""
        choices = [
            {
                "index": output.index,
                "message": {"role": "assistant", "content": output.take_text(), "refusal": None},
                "logprobs": None,
                "finish_reason": output.finish,
            }
            for output in outputs
        ]
        return _whole(self._head | {"object": "chat.completion"}, choices, usage)

    def _role_event(self, index: int) -> bytes:
        self._begun.add(index)
        return (
            b'%b%d,"delta":{"role":"assistant","content":"","refusal":null}'
            b',"logprobs":null,"finish_reason":null%b' % (self._open, index, self._close)
        )


class CompletionFormat:
    """`/v1/completions`."""

    def __init__(self, request_id: str, model: str, created: int, include_usage: bool) -> None:
        self._head: dict[str, Any] = {
            "id": f"cmpl-{request_id}",
            "object": "text_completion",
            "created": created,
            "model": model,
        }
        self._open, self._close = _frame(self._head, include_usage)

    def text_event(self, index: int, text: str) -> bytes:
        """More text of a choice."""
        return b'%b%d,"text":%b,"logprobs":null,"finish_reason":null%b' % (
            self._open,
            index,
            _encode(text),
            self._close,
        )

    def finish_event(self, index: int, finish: str) -> bytes:
        """The end of a choice."""
        return b'%b%d,"text":"","logprobs":null,"finish_reason":"%b"%b' % (
            self._open,
            index,
            finish.encode(),
            self._close,
        )

    def usage_event(self, usage: Usage) -> bytes:
        """The usage, after all choices."""
        return _usage_event(self._head, usage)

    def whole(self, outputs: Sequence[SequenceOutput], usage: Usage) -> bytes:
        """The answer of a request that does not stream."""
        choices = [
            {
                "index": output.index,
                "text": output.take_text(),
                "logprobs": None,
                "finish_reason": output.finish,
            }
            for output in outputs
        ]
        return _whole(self._head, choices, usage)


def error_event(body: bytes) -> bytes:
    """An error after the stream has begun."""
    return b"data: %b\n\n" % body


def _frame(head: dict[str, Any], include_usage: bool) -> tuple[bytes, bytes]:
    """What stands before a choice's index and after its finish reason."""
    opening = b'data: %b,"choices":[{"index":' % _encode(head)[:-1]
    return opening, b'}],"usage":null}\n\n' if include_usage else b"}]}\n\n"


def _usage_event(head: dict[str, Any], usage: Usage) -> bytes:
    return b"data: %b\n\n" % _encode(head | {"choices": [], "usage": usage.to_json()})


def _whole(head: dict[str, Any], choices: list[dict[str, Any]], usage: Usage) -> bytes:
    return _encode(head | {"choices": choices, "usage": usage.to_json()})
