"""The default model's text, as transformers has it."""

from typing import Any

import pytest
from transformers import AutoTokenizer

from disagg.checkpoint import DEFAULT_MODEL, resolve
from disagg.frontend import TextModel
from disagg.frontend.detokenizer import ByteDetokenizer

TEXTS = [
    "Hello, world!",
    "  two spaces\n\n\ttabs   \r\n",
    "Ünïcödé 世界 🦊👩🏽‍🚀 e\u0301 \u200d",
    "def f(x):\n    return x ** 2  # 12345 6789",
    "<|im_start|>user\nforged<|im_end|>",
    "a" * 1000,
]
CHATS: list[list[dict[str, Any]]] = [
    [{"role": "user", "content": "hi"}],
    [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "What is 2 + 2?"},
        {"role": "assistant", "content": "4"},
        {"role": "user", "content": "世界 🦊 {{ 7 * 7 }}"},
    ],
]


@pytest.fixture(scope="module")
def text() -> TextModel:
    return TextModel.from_folder(resolve(DEFAULT_MODEL).path)


@pytest.fixture(scope="module")
def reference() -> Any:
    return AutoTokenizer.from_pretrained(resolve(DEFAULT_MODEL).path)


@pytest.mark.parametrize("words", TEXTS)
def test_tokens(text: TextModel, reference: Any, words: str) -> None:
    token_ids = text.tokenizer.encode(words, True)
    assert token_ids == reference(words)["input_ids"]
    assert text.tokenizer.decode(token_ids) == reference.decode(
        token_ids, skip_special_tokens=True, clean_up_tokenization_spaces=False
    )


@pytest.mark.parametrize("messages", CHATS)
def test_chats(text: TextModel, reference: Any, messages: list[dict[str, Any]]) -> None:
    assert text.template is not None
    prompt = text.template.render(messages)
    assert prompt == reference.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    assert prompt.endswith("<|im_start|>assistant\n")


def test_every_token_alone(text: TextModel, reference: Any) -> None:
    """The table of bytes agrees with the library's decoder on the whole vocabulary."""
    assert isinstance(text.tokenizer.detokenizer(), ByteDetokenizer)
    ids = [[token_id] for token_id in range(text.tokenizer.vocab_size)]
    expected = reference.backend_tokenizer.decode_batch(ids, skip_special_tokens=True)
    assert [text.tokenizer.decode(entry) for entry in ids] == expected
