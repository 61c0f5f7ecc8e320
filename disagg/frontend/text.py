"""From a call's messages or prompts to token ids, off the event loop where that takes long."""

import asyncio
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Self, TypeVar

from disagg.errors import InvalidRequest, Overloaded, PromptTooLong
from disagg.frontend.chat_template import ChatTemplate
from disagg.frontend.schemas import ChatCall, CompletionCall
from disagg.frontend.tokenizer import Tokenizer

INLINE_BYTES = 4096
"""Shorter bodies are encoded on the event loop: about 0.7 ms at most, where a thread costs 65 us each."""
MAX_WAITING_BYTES = 16 * 1024 * 1024
"""Of bodies that wait for a thread: a few seconds of work. Past it clients are told to come back."""
_REWRITE_FACTOR = 4
"""Unicode normalization shrinks text by less than this."""
_USUAL_CHARS_PER_TOKEN = 8
_CUT_TOKENS = 64
"""A cut changes how the text beside it is tokenized, by fewer tokens than this."""

T = TypeVar("T")


class TextModel:
    """A model's tokenizer and chat template, and the threads that run them."""

    def __init__(self, tokenizer: Tokenizer, template: ChatTemplate | None, num_threads: int = 0) -> None:
        self.tokenizer = tokenizer
        self.template = template
        self._threads = ThreadPoolExecutor(
            num_threads or min(4, os.cpu_count() or 1), thread_name_prefix="tokenize"
        )
        self._waiting_bytes = 0

    @classmethod
    def from_folder(cls, folder: Path, chat_template: Path | None = None) -> Self:
        """Load a model folder's tokenizer.json and chat template.

        Raises:
            ConfigError: A file is missing or damaged.
        """
        return cls(Tokenizer.from_folder(folder), ChatTemplate.from_folder(folder, chat_template))

    def close(self) -> None:
        """Let go of the threads; what waits is dropped."""
        self._threads.shutdown(wait=False, cancel_futures=True)

    async def encode_chat(self, call: ChatCall, num_bytes: int, max_tokens: int) -> list[list[int]]:
        """Render a chat and tokenize it; `num_bytes` is the body's length.

        Raises:
            InvalidRequest: The template refused.
            PromptTooLong: It is certain to have more than `max_tokens`.
        """
        return await self._run(num_bytes, lambda: [self._encode_chat(call, max_tokens)])

    async def encode_prompts(self, call: CompletionCall, num_bytes: int, max_tokens: int) -> list[list[int]]:
        """Tokenize prompts of text, check those of tokens; `num_bytes` is the body's length.

        Raises:
            InvalidRequest: A token id is out of the vocabulary, or nothing is left of a prompt.
            PromptTooLong: One is certain to have more than `max_tokens`.
        """
        return await self._run(
            num_bytes, lambda: [self._encode_prompt(prompt, max_tokens) for prompt in call.prompts]
        )

    def _encode_chat(self, call: ChatCall, max_tokens: int) -> list[int]:
        if self.template is None:
            raise InvalidRequest("this model has no chat template; use /v1/completions", param="messages")
        self._check_length(sum(map(_num_bytes, call.messages)), max_tokens, "messages")
        text = self.template.render(call.messages, call.template_arguments)
        # The template writes the special tokens out, BOS too.
        return self._encode(text, False, max_tokens, "messages")

    def _encode_prompt(self, prompt: str | list[int], max_tokens: int) -> list[int]:
        if isinstance(prompt, str):
            return self._encode(prompt, True, max_tokens, "prompt")
        largest = self.tokenizer.vocab_size - 1
        for token_id in (min(prompt), max(prompt)):
            if not 0 <= token_id <= largest:
                raise InvalidRequest(
                    f"prompt has token {token_id}; the vocabulary is 0 to {largest}", param="prompt"
                )
        return prompt

    def _encode(self, text: str, add_special_tokens: bool, max_tokens: int, param: str) -> list[int]:
        self._check_length(len(text), max_tokens, param)
        if len(text) > max_tokens * _USUAL_CHARS_PER_TOKEN:
            self._check_by_piece(text, max_tokens, param)
        token_ids = self.tokenizer.encode(text, add_special_tokens)
        if not token_ids:
            raise InvalidRequest(f"{param} has no tokens", param=param)
        return token_ids

    def _check_length(self, num_bytes: int, max_tokens: int, param: str) -> None:
        """Refuse what cannot fit before it costs seconds."""
        if num_bytes > max_tokens * self.tokenizer.max_token_bytes * _REWRITE_FACTOR:
            raise PromptTooLong(
                f"the context is {max_tokens} tokens, and {param} is longer than they can be", param=param
            )

    def _check_by_piece(self, text: str, max_tokens: int, param: str) -> None:
        """Count tokens piece by piece and stop when there are too many: megabytes of digits take seconds."""
        size = max_tokens * _USUAL_CHARS_PER_TOKEN
        num_tokens = 0
        for start in range(0, len(text), size):
            num_tokens += len(self.tokenizer.encode(text[start : start + size], False)) - _CUT_TOKENS
            if num_tokens > max_tokens:
                raise PromptTooLong(
                    f"the context is {max_tokens} tokens, and {param} has more than that", param=param
                )

    async def _run(self, num_bytes: int, work: Callable[[], T]) -> T:
        if num_bytes <= INLINE_BYTES:
            return work()
        if self._waiting_bytes + num_bytes > MAX_WAITING_BYTES:
            raise Overloaded("too many long prompts are waiting to be tokenized", retry_after_s=1.0)
        self._waiting_bytes += num_bytes
        try:
            return await asyncio.get_running_loop().run_in_executor(self._threads, work)
        finally:
            self._waiting_bytes -= num_bytes


def _num_bytes(message: dict[str, Any]) -> int:
    return len(message["content"])
