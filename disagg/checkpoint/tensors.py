"""Safetensors on disk, read and written piece by piece.

The format is eight bytes of header length, a JSON header and the tensors' bytes. Reading goes by
`preadv` into the caller's buffer and not by mapping the file: mapped pages would count towards the
process's memory until it ends, which doubles the peak of a load.
"""

import json
import os
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from msgspec import DecodeError, Struct, ValidationError, convert
from msgspec.json import decode

from disagg.errors import ConfigError

ITEM_BYTES = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2, "I64": 8, "I32": 4, "I16": 2, "I8": 1, "U8": 1}
ITEM_BYTES |= {"BOOL": 1, "F8_E4M3": 1, "F8_E5M2": 1}

INDEX_NAME = "model.safetensors.index.json"
SINGLE_NAME = "model.safetensors"

# The format's own limit; a larger length means that the file is something else.
MAX_HEADER_BYTES = 100_000_000


class TensorEntry(Struct, frozen=True):
    """Where one tensor lies: `num_bytes` at `offset` of the file `path`, C-contiguous."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    path: Path
    offset: int
    num_bytes: int


class TensorSpec(Struct, frozen=True):
    """A tensor to be written."""

    name: str
    dtype: str
    shape: tuple[int, ...]

    @property
    def num_bytes(self) -> int:
        """Bytes of the whole tensor."""
        count = ITEM_BYTES[self.dtype]
        for size in self.shape:
            count *= size
        return count


class _HeaderEntry(Struct, frozen=True):
    dtype: str
    shape: tuple[int, ...]
    data_offsets: tuple[int, int]


def read_index(folder: Path) -> dict[str, TensorEntry]:
    """Find every tensor of the safetensors files in `folder`, sharded or not.

    Raises:
        ConfigError: a file is missing, cut short or not safetensors.
    """
    entries: dict[str, TensorEntry] = {}
    for path in weight_files(folder):
        for entry in read_header(path):
            entries[entry.name] = entry
    return entries


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files of a checkpoint: those its index names, or all in the folder.

    Raises:
        ConfigError: there is none, or the index names one that is missing.
    """
    index = folder / INDEX_NAME
    if index.exists():
        try:
            weight_map = convert(decode(index.read_bytes())["weight_map"], dict[str, str])
        except (DecodeError, ValidationError, KeyError, TypeError) as e:
            raise ConfigError(f"{index} is not an index of safetensors files: {e}") from e
        paths = [folder / name for name in sorted(set(weight_map.values()))]
    else:
        paths = sorted(folder.glob("*.safetensors"))
    missing = [path.name for path in paths if not path.exists()]
    if missing:
        raise ConfigError(f"{folder} is incomplete: {', '.join(missing)} named by {INDEX_NAME} is missing")
    if not paths:
        raise ConfigError(f"{folder} holds no .safetensors file")
    return paths


def read_header(path: Path) -> list[TensorEntry]:
    """The tensors of one file, checked to lie within it.

    Raises:
        ConfigError: the file is cut short or not safetensors.
    """
    size = path.stat().st_size
    with path.open("rb") as file:
        header_bytes = int.from_bytes(file.read(8), "little")
        if not 0 < header_bytes <= min(size - 8, MAX_HEADER_BYTES):
            raise ConfigError(f"{path} is not a safetensors file, or cut short at {size} bytes")
        try:
            header = convert(decode(file.read(header_bytes)), dict[str, Any])
            header.pop("__metadata__", None)
            described = convert(header, dict[str, _HeaderEntry])
        except (DecodeError, ValidationError) as e:
            raise ConfigError(f"{path} has a damaged safetensors header: {e}") from e
    return [_to_entry(path, size, 8 + header_bytes, name, entry) for name, entry in described.items()]


def _to_entry(path: Path, file_bytes: int, data_at: int, name: str, entry: _HeaderEntry) -> TensorEntry:
    begin, end = entry.data_offsets
    if entry.dtype not in ITEM_BYTES:
        raise ConfigError(f"{path}: tensor {name} has the unknown type {entry.dtype}")
    if end - begin != TensorSpec(name, entry.dtype, entry.shape).num_bytes:
        raise ConfigError(f"{path}: tensor {name} has {end - begin} bytes, not what its shape needs")
    if begin < 0 or data_at + end > file_bytes:
        raise ConfigError(f"{path} is cut short: {name} ends at {data_at + end} of {file_bytes} bytes")
    return TensorEntry(name, entry.dtype, entry.shape, path, data_at + begin, end - begin)


class TensorReader:
    """Reads pieces of tensors into the caller's memory; keeps each file open until closed."""

    def __init__(self) -> None:
        self._files: dict[Path, int] = {}

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def read_into(self, entry: TensorEntry, begin: int, buffer: memoryview) -> None:
        """Fill `buffer` (bytes, writable) from byte `begin` of the tensor.

        Raises:
            ConfigError: the file has become shorter since its header was read.
        """
        assert begin >= 0
        assert begin + len(buffer) <= entry.num_bytes
        file = self._files.get(entry.path)
        if file is None:
            file = self._files[entry.path] = os.open(entry.path, os.O_RDONLY)
        done = 0
        while done < len(buffer):
            # Linux moves at most 2 GiB a call.
            count = os.preadv(file, [buffer[done:]], entry.offset + begin + done)
            if count == 0:
                raise ConfigError(f"{entry.path} was cut short while {entry.name} was read")
            done += count

    def close(self) -> None:
        """Close every file. May be called twice."""
        for file in self._files.values():
            os.close(file)
        self._files.clear()


class TensorWriter:
    """Writes one safetensors file front to back, so that no whole tensor need be in memory."""

    def __init__(self, path: Path, specs: Sequence[TensorSpec]) -> None:
        header: dict[str, object] = {"__metadata__": {"format": "pt"}}
        offset = 0
        for spec in specs:
            header[spec.name] = {
                "dtype": spec.dtype,
                "shape": spec.shape,
                "data_offsets": (offset, offset + spec.num_bytes),
            }
            offset += spec.num_bytes
        encoded = json.dumps(header).encode()
        encoded += b" " * (-(8 + len(encoded)) % 64)  # the data begins aligned
        self._expected = 8 + len(encoded) + offset
        self._file = path.open("wb")
        self._file.write(len(encoded).to_bytes(8, "little") + encoded)

    def write(self, piece: memoryview) -> None:
        """Append bytes: the tensors in the order of `specs`, each C-contiguous, in pieces of any size."""
        self._file.write(piece)

    def finish(self) -> None:
        """Make the file durable and close it."""
        assert self._file.tell() == self._expected
        self._file.flush()
        os.fsync(self._file.fileno())
        self._file.close()

    def close(self) -> None:
        """Close without finishing, for example after an error. May be called twice."""
        self._file.close()
