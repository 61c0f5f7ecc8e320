"""A model's tokenizer.json, without transformers."""

import json
from pathlib import Path
from typing import Any, Self

from tokenizers import Tokenizer as HfTokenizer

from disagg.checkpoint import byte_alphabet
from disagg.errors import ConfigError
from disagg.frontend.detokenizer import ByteDetokenizer, ContextDetokenizer, Detokenizer


class Tokenizer:
    """Text to token ids and back. Safe to use from several threads; encoding releases the GIL."""

    def __init__(self, tokenizer: HfTokenizer, bos_token_id: int | None = None) -> None:
        self._tokenizer = tokenizer
        self._bos_token_id = bos_token_id
        vocabulary = tokenizer.get_vocab(with_added_tokens=True)
        self.vocab_size = max(vocabulary.values(), default=-1) + 1
        """One more than the largest token id."""
        self.max_token_bytes = max((len(token.encode()) for token in vocabulary), default=1)
        """No token stands for more text than this, in UTF-8, unless the tokenizer rewrites its input."""
        self._table = _byte_table(tokenizer, self.vocab_size)

    @classmethod
    def from_folder(cls, folder: Path) -> Self:
        """Load `tokenizer.json`, and which token begins a text from `tokenizer_config.json`."""
        path = folder / "tokenizer.json"
        try:
            tokenizer = HfTokenizer.from_file(str(path))
        except Exception as error:  # the library raises bare Exception for every kind of damage
            raise ConfigError(f"cannot load the tokenizer {path}: {error}") from error
        tokenizer.no_truncation()
        tokenizer.no_padding()
        bos = special_tokens(folder).get("bos_token")
        return cls(tokenizer, tokenizer.token_to_id(bos) if bos else None)

    def encode(self, text: str, add_special_tokens: bool) -> list[int]:
        """Tokenize. With `add_special_tokens` as the model's post-processor says, but one BOS at most."""
        # The batch call is the one that skips offsets: a third faster at any length.
        batch = self._tokenizer.encode_batch_fast([text], add_special_tokens=add_special_tokens)
        token_ids: list[int] = batch[0].ids
        bos = self._bos_token_id
        if add_special_tokens and bos is not None and token_ids[:2] == [bos, bos]:
            return token_ids[1:]
        return token_ids

    def decode(self, token_ids: list[int]) -> str:
        """Turn a whole output into text, without special tokens."""
        detokenizer = self.detokenizer()
        return detokenizer.push(token_ids) + detokenizer.flush()

    def detokenizer(self) -> Detokenizer:
        """Start to detokenize one sequence."""
        if self._table is not None:
            return ByteDetokenizer(self._table)
        return ContextDetokenizer(self._tokenizer)


def special_tokens(folder: Path) -> dict[str, str]:
    """`bos_token`, `eos_token` and the like of a model's folder, by name."""
    config = read_json(folder / "tokenizer_config.json")
    tokens = {name: value for name, value in config.items() if name.endswith("_token")}
    texts = {n: v["content"] if isinstance(v, dict) and "content" in v else v for n, v in tokens.items()}
    return {name: text for name, text in texts.items() if isinstance(text, str)}


def read_json(path: Path) -> dict[str, Any]:
    """Read an object, or an empty one where the file is absent."""
    if not path.exists():
        return {}
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError(f"cannot read {path}: {error}") from error
    if not isinstance(value, dict):
        raise ConfigError(f"{path} is not a JSON object")
    return value


def _byte_table(tokenizer: HfTokenizer, vocab_size: int) -> list[bytes] | None:
    """The bytes of every token where the decoder is ByteLevel alone, else None.

    The rule for a token that is not spelt in the byte alphabet is the decoder's own: its text.
    """
    settings = json.loads(tokenizer.to_str())
    if (settings.get("decoder") or {}).get("type") != "ByteLevel":
        return None
    byte_of = {char: byte for byte, char in byte_alphabet().items()}
    table = [b""] * vocab_size
    special = {token_id for token_id, token in tokenizer.get_added_tokens_decoder().items() if token.special}
    for token, token_id in tokenizer.get_vocab(with_added_tokens=True).items():
        if token_id in special:
            continue
        spelt = all(char in byte_of for char in token)
        table[token_id] = bytes(byte_of[char] for char in token) if spelt else token.encode()
    return table
