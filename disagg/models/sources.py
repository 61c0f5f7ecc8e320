"""Where weights come from: a checkpoint on disk, or noise. Both give any rectangle of any tensor."""

import zlib
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from disagg.checkpoint import TensorEntry, TensorReader
from disagg.errors import ConfigError
from disagg.models.parameters import Piece

_TORCH_DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}

# A prime, so that rows of no matrix start at the same place again before they must.
NOISE_LENGTH = 1_048_573


class WeightSource(Protocol):
    """Tensors by their Hugging Face names."""

    def dtype(self, name: str) -> torch.dtype:
        """The type in which `rows` come."""
        ...

    def read(self, piece: Piece, shape: tuple[int, ...], out: Tensor) -> None:
        """Write a piece to `out`: the piece's shape, C-contiguous on the CPU, of this source's dtype.

        `shape` is what the whole tensor must have.
        """
        ...


class CheckpointSource:
    """Safetensors files. `reader` is the caller's to close."""

    def __init__(self, entries: dict[str, TensorEntry], reader: TensorReader) -> None:
        self._entries = entries
        self._reader = reader

    def dtype(self, name: str) -> torch.dtype:
        """The type in the file.

        Raises:
            ConfigError: the tensor is missing, or not of a floating type that can be loaded.
        """
        entry = self._entry(name)
        dtype = _TORCH_DTYPES.get(entry.dtype)
        if dtype is None:
            raise ConfigError(f"{entry.path}: {name} has type {entry.dtype}; loaded are F32, F16 and BF16")
        return dtype

    def read(self, piece: Piece, shape: tuple[int, ...], out: Tensor) -> None:
        """Read from the file those bytes alone, in one call or, of a cut row, in one call a row.

        Raises:
            ConfigError: the tensor has another shape than config.json implies.
        """
        entry = self._entry(piece.name)
        if entry.shape != shape:
            raise ConfigError(
                f"{entry.path}: {piece.name} has shape {entry.shape}, config.json implies {shape}"
            )
        buffer = out.view(torch.uint8).numpy().data.cast("B")
        row_bytes = entry.num_bytes // shape[0]
        if piece.columns is None or len(piece.columns) == shape[1]:
            self._reader.read_into(entry, piece.rows.start * row_bytes, buffer)
            return
        skipped, cut_bytes = (n * out.itemsize for n in (piece.columns.start, len(piece.columns)))
        for i, row in enumerate(piece.rows):
            into = buffer[i * cut_bytes : (i + 1) * cut_bytes]
            self._reader.read_into(entry, row * row_bytes + skipped, into)

    def _entry(self, name: str) -> TensorEntry:
        entry = self._entries.get(name)
        if entry is None:
            raise ConfigError(f"the checkpoint lacks the tensor {name}")
        return entry


class NoiseSource:
    """Random weights with an initializer's scale, the same for every tensor-parallel size and device.

    All tensors are windows of one line of normal noise, so any part of any of them costs a copy:
    drawing afresh would take minutes for a large model, and every rank would have to draw it all.
    """

    def __init__(self, seed: int, scale: float) -> None:
        generator = np.random.default_rng(seed)
        self._noise = torch.from_numpy(generator.standard_normal(NOISE_LENGTH, dtype=np.float32)) * scale

    def dtype(self, name: str) -> torch.dtype:
        """Always float32."""
        return torch.float32

    def read(self, piece: Piece, shape: tuple[int, ...], out: Tensor) -> None:
        """Norms are one and biases zero, as an initializer leaves them; matrices are noise."""
        if piece.name.endswith("norm.weight"):
            out.fill_(1.0)
        elif piece.name.endswith(".bias"):
            out.zero_()
        else:
            start = zlib.crc32(piece.name.encode())
            if piece.columns is None or len(piece.columns) == shape[1]:
                self._copy(start + piece.rows.start * shape[1], out.flatten())
                return
            for i, row in enumerate(piece.rows):
                self._copy(start + piece.columns.start + row * shape[1], out[i])

    def _copy(self, start: int, out: Tensor) -> None:
        """Fill `out` with the endless repetition of the noise, from `start`."""
        done = 0
        while done < len(out):
            at = (start + done) % NOISE_LENGTH
            count = min(NOISE_LENGTH - at, len(out) - done)
            out[done : done + count] = self._noise[at : at + count]
            done += count
