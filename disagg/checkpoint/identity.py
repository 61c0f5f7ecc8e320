"""Which model and which tokenizer a checkpoint is: hashes that two processes can compare.

Cheap, for they are made at every start: of the weights a sample of every tensor is read, a few hundred
KiB in all. That tells two models of one shape apart, a fine-tune from its base too, for training touches
every tensor. Where a checkpoint was found, and how it is cut into files, does not count.
"""

import hashlib
from pathlib import Path

from disagg.checkpoint.tensors import read_index

SAMPLE_BYTES = 1024
"""Read from the middle of each tensor."""


def model_hash(folder: Path, *, dummy_seed: int | None = None, quantization: str | None = None) -> str:
    """Hash config.json, the weights or the seed of dummy ones, and their rounding; 32 hexadecimal digits."""
    digest = hashlib.sha256((folder / "config.json").read_bytes())
    if quantization is not None:
        digest.update(f"quantization {quantization}".encode())
    if dummy_seed is not None:
        digest.update(f"dummy {dummy_seed}".encode())
        return digest.hexdigest()[:32]
    for name, entry in sorted(read_index(folder).items()):
        digest.update(f"{name} {entry.dtype} {entry.shape}".encode())
        with entry.path.open("rb", buffering=0) as file:
            file.seek(entry.offset + max(0, entry.num_bytes - SAMPLE_BYTES) // 2)
            digest.update(file.read(min(SAMPLE_BYTES, entry.num_bytes)))
    return digest.hexdigest()[:32]


def tokenizer_hash(folder: Path) -> str:
    """Hash tokenizer.json: what token ids mean. The chat template is not in it."""
    return hashlib.sha256((folder / "tokenizer.json").read_bytes()).hexdigest()[:32]
