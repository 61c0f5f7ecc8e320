"""Model files on this machine: finding them, and converting GGUF into Hugging Face's layout once.

May import `errors` only, and neither torch nor transformers, because the router uses it too. Read
`resolve.py` first, then `gguf.py`.
"""

from disagg.checkpoint.identity import model_hash, tokenizer_hash
from disagg.checkpoint.resolve import DEFAULT_MODEL, ModelFiles, resolve
from disagg.checkpoint.tensors import TensorEntry, TensorReader, read_index
from disagg.checkpoint.vocabulary import byte_alphabet

__all__ = [
    "DEFAULT_MODEL",
    "ModelFiles",
    "TensorEntry",
    "TensorReader",
    "byte_alphabet",
    "model_hash",
    "read_index",
    "resolve",
    "tokenizer_hash",
]
