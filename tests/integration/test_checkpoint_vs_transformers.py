"""The packaged GGUF of the default model, converted by us and by transformers, which share no code for it."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerBase

from disagg.checkpoint import DEFAULT_MODEL, resolve
from disagg.checkpoint.resolve import PACKAGED_MODELS, packaged_gguf

TEXTS = [
    "Hello world",
    " leading and trailing ",
    "don't 1234  x\n\n  y 3.14e-10",
    "    def f(x):\n\treturn x**2  # done\r\n",
    "Ünïcödé: 你好，世界! Здравствуй, мир! مرحبا بالعالم 🌍🚀🙂🙃",
    "é e\u0301 \u200b \ufeff \x00",
    "<|im_start|>user\nhi<|im_end|>\n<|endoftext|> <|im_end",
    "a" * 300,
]


@pytest.fixture(scope="module")
def gguf() -> Path:
    path = packaged_gguf(PACKAGED_MODELS[DEFAULT_MODEL])
    assert path is not None
    return path


@pytest.fixture(scope="module")
def converted() -> Path:
    return resolve(DEFAULT_MODEL).path


def test_texts_become_the_same_tokens(gguf: Path, converted: Path) -> None:
    theirs: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    ours: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(converted)
    for text in TEXTS:
        ids = ours(text, add_special_tokens=False).input_ids
        assert ids == theirs(text, add_special_tokens=False).input_ids
        assert ours.decode(ids) == text
    assert (ours.eos_token, ours.bos_token) == (theirs.eos_token, theirs.bos_token)
    messages = [{"role": "user", "content": "Hi"}]
    chat = ours.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert chat.endswith("<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n")


def test_weights_are_the_same(gguf: Path, converted: Path) -> None:
    theirs = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.float32)
    ours = load_file(converted / "model.safetensors")
    expected = theirs.state_dict()
    del expected["lm_head.weight"]  # tied
    assert ours.keys() == expected.keys()
    for name, tensor in ours.items():
        torch.testing.assert_close(tensor, expected[name], rtol=0, atol=0, msg=name)
