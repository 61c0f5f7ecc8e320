"""Logits of every family are transformers', and so are those of the default model."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from disagg.checkpoint import DEFAULT_MODEL, ModelFiles, resolve
from disagg.models import load_model, load_spec
from support.checkpoints import FAMILIES, make_checkpoint
from support.gguf_files import write_gguf
from support.paged import PagedDriver, PagedSequence

NUM_TOKENS = 150

# What the families' rows and a checkpoint's own fields may combine to.
VARIANTS: dict[str, dict[str, Any]] = {
    "llama": {},
    "llama untied": {"tie_word_embeddings": False},
    "llama with a KV head for each head": {"num_key_value_heads": 12},
    "llama with one KV head": {"num_key_value_heads": 1},
    "llama with wide heads": {"head_dim": 32},
    "llama with odd sizes": {"hidden_size": 108, "intermediate_size": 90, "head_dim": 8, "vocab_size": 331},
    "llama with biases": {"attention_bias": True, "mlp_bias": True},
    "llama3": {},
    "llama3 tied": {"tie_word_embeddings": True},
    "llama_linear": {},
    "mistral": {},
    "qwen2": {},
    "qwen2 untied": {"tie_word_embeddings": False},
    "qwen3": {},
    "qwen3 with biases": {"attention_bias": True},
    "qwen3 tied": {"tie_word_embeddings": True},
    "qwen3_moe": {},
    "qwen3_moe with shares of all experts": {"norm_topk_prob": False},
    "qwen3_moe with one choice": {"num_experts_per_tok": 1},
    "qwen3_moe with odd sizes": {"moe_intermediate_size": 36, "num_experts": 7},
}


def driver(folder: Path, dtype: torch.dtype = torch.float32) -> PagedDriver:
    return PagedDriver(load_model(ModelFiles(folder, "m", "test"), load_spec(folder), dtype=dtype))


@torch.inference_mode()
def reference_logits(folder: Path, token_ids: list[int]) -> Tensor:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    logits: Tensor = model(torch.tensor([token_ids])).logits[0]
    return logits


def random_tokens(count: int = NUM_TOKENS) -> list[int]:
    return torch.randint(3, 320, (count,), generator=torch.Generator().manual_seed(1)).tolist()


def test_every_family_has_a_variant() -> None:
    assert {name.partition(" ")[0] for name in VARIANTS} == set(FAMILIES)


@pytest.mark.parametrize("variant", VARIANTS)
def test_logits_of_every_position(tmp_path: Path, variant: str) -> None:
    """In one step, in chunks that end anywhere, and token by token."""
    folder = make_checkpoint(tmp_path / "m", variant.partition(" ")[0], **VARIANTS[variant])
    tokens = random_tokens()
    expected = reference_logits(folder, tokens)
    runs = driver(folder)
    for counts in ([NUM_TOKENS], [70, 1, 16, 63], [100] + [1] * 50):
        sequence = PagedSequence(tokens)
        logits = torch.cat([runs.step([(sequence, n)], range(n)) for n in counts])
        torch.testing.assert_close(logits, expected, atol=2e-4, rtol=1e-4)


@pytest.mark.parametrize("family", ["llama", "qwen3", "qwen3_moe"])
def test_sequences_in_one_step_do_not_meet(tmp_path: Path, family: str) -> None:
    """Decodes and prefill chunks of other sequences in the same step change nothing."""
    folder = make_checkpoint(tmp_path / "m", family)
    runs = driver(folder)
    prompts = [random_tokens(n) for n in (90, 33, 64, 17)]
    expected = torch.cat([runs.prefill(prompt)[1] for prompt in prompts])
    decoding, alone, chunked, fresh = [PagedSequence(prompt) for prompt in prompts]
    runs.step([(decoding, 89), (alone, 32), (chunked, 40)], logits_at=())
    together = runs.step([(decoding, 1), (alone, 1), (chunked, 24), (fresh, 17)])
    torch.testing.assert_close(together, expected, atol=1e-4, rtol=1e-4)


def test_greedy_text_of_a_gguf_is_transformers(tmp_path: Path) -> None:
    """Through our conversion and through theirs, which share no code."""
    path = tmp_path / "tiny.gguf"
    tokenizer = (make_checkpoint(tmp_path / "source") / "tokenizer.json").read_text()
    write_gguf(path, quantization="Q8_0", tokenizer_json=tokenizer)
    from disagg.checkpoint.gguf import convert_gguf

    folder = tmp_path / "converted"
    folder.mkdir()
    convert_gguf(path, folder)
    tokens = random_tokens(40)
    model = AutoModelForCausalLM.from_pretrained(
        tmp_path, gguf_file=path.name, dtype=torch.float32, head_dim=32
    ).eval()
    with torch.inference_mode():
        expected = model(torch.tensor([tokens])).logits[0]
    logits = driver(folder).step([(PagedSequence(tokens), 40)], range(40))
    torch.testing.assert_close(logits, expected, atol=2e-4, rtol=1e-4)


PROMPTS = [
    "The capital of France is",
    "Ünïcödé: 你好，世界! Здравствуй, мир! 🌍🚀",
    "def fibonacci(n):\n    if n < 2:\n        return n\n" * 8,
    "<|im_start|>user\nWhat is gravity?<|im_end|>\n<|im_start|>assistant\n",
]


@dataclass
class Reference:
    """The default model as transformers runs it."""

    folder: Path
    prompts: list[list[int]]
    logits: dict[torch.dtype, list[Tensor]]
    """float32, of every position of each prompt, computed in the key's type."""
    continuation: list[int]
    """Greedy, in float32, of the longest prompt."""


@pytest.fixture(scope="module")
def reference() -> Reference:
    folder = resolve(DEFAULT_MODEL).path
    tokenizer = AutoTokenizer.from_pretrained(folder)
    prompts = [tokenizer(text, add_special_tokens=False).input_ids for text in PROMPTS]
    logits = {}
    for dtype in (torch.bfloat16, torch.float32):
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).eval()
        with torch.inference_mode():
            logits[dtype] = [model(torch.tensor([ids])).logits[0].float() for ids in prompts]
    longest = max(prompts, key=len)
    whole = model.generate(torch.tensor([longest]), max_new_tokens=24, do_sample=False)[0].tolist()
    return Reference(folder, prompts, logits, whole[len(longest) :])


def our_logits(reference: Reference, dtype: torch.dtype) -> list[Tensor]:
    runs = driver(reference.folder, dtype)
    return [runs.step([(PagedSequence(ids), len(ids))], range(len(ids))).float() for ids in reference.prompts]


def test_logits_of_the_default_model(reference: Reference) -> None:
    expected = reference.logits[torch.float32]
    for ours, exact in zip(our_logits(reference, torch.float32), expected, strict=True):
        torch.testing.assert_close(ours, exact, atol=1e-3, rtol=1e-4)


def test_bfloat16_logits_of_the_default_model_are_as_close_as_transformers(reference: Reference) -> None:
    """Both round, each its own way, so both are held against the float32 logits."""
    exact = torch.cat(reference.logits[torch.float32])
    theirs = torch.cat(reference.logits[torch.bfloat16])
    ours = torch.cat(our_logits(reference, torch.bfloat16))
    assert (ours - exact).square().mean() < 1.25 * (theirs - exact).square().mean()
    # Where the best token changed, it was a near-tie.
    chosen = exact.gather(1, ours.argmax(-1, keepdim=True))[:, 0]
    assert (exact.max(-1).values - chosen).max() < 0.5


def test_tokens_of_the_default_model_are_transformers(reference: Reference) -> None:
    """Greedy, token for token, with a prompt that is prefilled in chunks."""
    longest = max(reference.prompts, key=len)
    assert driver(reference.folder).generate(longest, 24, chunk=50) == reference.continuation
