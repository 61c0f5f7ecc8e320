"""tokenizer.json and tokenizer_config.json from the vocabulary that a GGUF file carries.

A GGUF stores tokens, merges and token types, and names the pre-tokenizer; the rules behind that
name are here, as a table. They are those of the models' own tokenizer.json files.
"""

import json
from functools import cache
from pathlib import Path
from typing import Any

from msgspec import Struct
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

from disagg.errors import ConfigError

CONTROL, USER_DEFINED = 3, 4  # token types of llama.cpp

_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_QWEN2 = _LLAMA3.replace(r"\p{N}{1,3}", r"\p{N}")


class PreTokenizer(Struct, frozen=True):
    """How text is cut before merges apply."""

    split: str
    """Each match of this is a word."""
    split_digits: bool = False
    """Every digit stands alone, cut off before `split` looks at what is left."""
    whole_words_first: bool = False
    """A word that is in the vocabulary is one token, even where merges do not lead to it."""
    compose: bool = False
    """Unicode is composed first (NFC)."""
    adds_bos: bool = False
    """Where the file does not say whether texts begin with the BOS token."""


_SMOLLM = PreTokenizer(_GPT2, split_digits=True)
_LLAMA3_WORDS = PreTokenizer(_LLAMA3, whole_words_first=True, adds_bos=True)

PRE_TOKENIZERS = {
    "default": PreTokenizer(_GPT2),
    "gpt2": PreTokenizer(_GPT2),
    "gpt-2": PreTokenizer(_GPT2),
    "smollm": _SMOLLM,
    "llama-bpe": _LLAMA3_WORDS,
    "llama-v3": _LLAMA3_WORDS,
    "llama3": _LLAMA3_WORDS,
    "qwen2": PreTokenizer(_QWEN2, compose=True),
    "deepseek-r1-qwen": PreTokenizer(_QWEN2, compose=True),
}


def write_tokenizer(metadata: dict[str, Any], folder: Path, source: Path) -> None:
    """Write tokenizer.json and tokenizer_config.json for a GGUF file's `metadata` into `folder`.

    Raises:
        ConfigError: the vocabulary is of a kind that is not supported; names `source`.
    """
    rules = _rules(metadata, source)
    try:
        tokenizer = _build(metadata, rules)
    except Exception as e:  # the library raises bare Exception for merges of tokens that are not there
        raise ConfigError(f"{source} has no usable vocabulary: {e!r}") from e
    tokenizer.save(str(folder / "tokenizer.json"), pretty=False)
    config = _tokenizer_config(metadata, rules)
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2, ensure_ascii=False))


def _rules(metadata: dict[str, Any], source: Path) -> PreTokenizer:
    kind = metadata.get("tokenizer.ggml.model")
    if kind != "gpt2":
        raise ConfigError(f"{source} has a vocabulary of kind {kind!r}; supported is 'gpt2' (byte-level BPE)")
    name = metadata.get("tokenizer.ggml.pre", "default")
    rules = PRE_TOKENIZERS.get(name)
    if rules is None:
        known = ", ".join(PRE_TOKENIZERS)
        raise ConfigError(f"{source} has the unknown pre-tokenizer {name!r}; known are {known}")
    return rules


def _build(metadata: dict[str, Any], rules: PreTokenizer) -> Tokenizer:
    tokens: list[str] = metadata["tokenizer.ggml.tokens"]
    types: list[int] = metadata.get("tokenizer.ggml.token_type") or [1] * len(tokens)
    added = {i for i, kind in enumerate(types) if kind in (CONTROL, USER_DEFINED)}
    vocab = {token if i in added else _spell(token): i for i, token in enumerate(tokens)}
    merges = [_split_merge(merge) for merge in metadata["tokenizer.ggml.merges"]]
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=merges, ignore_merges=rules.whole_words_first))
    if rules.compose:
        tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = _pre_tokenizer(rules)
    tokenizer.decoder = decoders.ByteLevel()
    # Special tokens are left out of decoded text; user-defined ones, like <think>, are not.
    for i in sorted(added):
        special = types[i] == CONTROL
        tokenizer.add_tokens([AddedToken(tokens[i], normalized=False, special=special)])
    if _adds_bos(metadata, rules):
        bos_id = metadata["tokenizer.ggml.bos_token_id"]
        bos = tokens[bos_id]
        tokenizer.post_processor = processors.TemplateProcessing(
            single=f"{bos}:0 $A:0", pair=f"{bos}:0 $A:0 {bos}:1 $B:1", special_tokens=[(bos, bos_id)]
        )
    return tokenizer


def _pre_tokenizer(rules: PreTokenizer) -> pre_tokenizers.PreTokenizer:
    steps: list[pre_tokenizers.PreTokenizer] = []
    if rules.split_digits:
        steps.append(pre_tokenizers.Digits(individual_digits=True))
    steps.append(pre_tokenizers.Split(Regex(rules.split), behavior="isolated"))
    steps.append(pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False))
    return pre_tokenizers.Sequence(steps)


def _split_merge(merge: str) -> tuple[str, str]:
    left, right = merge.split(" ")
    return left, right


def _spell(token: str) -> str:
    """A token in the byte alphabet; a few converters leave some in plain text."""
    spelling = byte_alphabet()
    if set(token) <= set(spelling.values()):
        return token
    return "".join(spelling[byte] for byte in token.encode())


@cache
def byte_alphabet() -> dict[int, str]:
    """GPT-2's printable stand-in of each byte: itself where printable, else one past U+0100."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    spelling = {byte: chr(byte) for byte in printable}
    return spelling | {byte: chr(256 + i) for i, byte in enumerate(others)}


def _adds_bos(metadata: dict[str, Any], rules: PreTokenizer) -> bool:
    return bool(metadata.get("tokenizer.ggml.add_bos_token", rules.adds_bos))


def _tokenizer_config(metadata: dict[str, Any], rules: PreTokenizer) -> dict[str, Any]:
    tokens: list[str] = metadata["tokenizer.ggml.tokens"]
    config: dict[str, Any] = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "add_bos_token": _adds_bos(metadata, rules),
        "clean_up_tokenization_spaces": False,
    }
    for name, key in (("bos", "bos"), ("eos", "eos"), ("unk", "unknown"), ("pad", "padding")):
        token_id = metadata.get(f"tokenizer.ggml.{key}_token_id")
        if token_id is not None and token_id < len(tokens):
            config[f"{name}_token"] = tokens[token_id]
    template = metadata.get("tokenizer.chat_template")
    if template is not None:
        config["chat_template"] = template
    return config
