"""The container of GGUF files: metadata, and where each tensor's bytes lie.

Parsed here rather than by `gguf.GGUFReader`, which makes an array object of every one of the
hundred thousand strings of a vocabulary and takes seconds for it.
"""

import mmap
import struct
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from msgspec import Struct

from disagg.errors import ConfigError

MAGIC = b"GGUF"
VERSIONS = (2, 3)
DEFAULT_ALIGNMENT = 32

_STRING, _ARRAY, _BOOL = 8, 9, 7
_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}


class GgufTensor(Struct, frozen=True):
    """One tensor. `shape` is in C order, so rows first; `offset` is from the start of the file."""

    name: str
    type_id: int
    """ggml's number of the element type, `gguf.GGMLQuantizationType`."""
    shape: tuple[int, ...]
    offset: int


class GgufFile:
    """An open, mapped GGUF file. Not thread-safe."""

    def __init__(self, path: Path) -> None:
        """Read the header of `path`.

        Raises:
            ConfigError: the file cannot be read, is no GGUF of a known version, or is cut short.
        """
        self.path = path
        try:
            with path.open("rb") as file:
                self._map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        except (OSError, ValueError) as e:
            raise ConfigError(f"{path} cannot be read: {e}") from e
        self.metadata: dict[str, Any] = {}
        self.tensors: dict[str, GgufTensor] = {}
        self._at = 0
        try:
            self._parse()
        except (struct.error, ValueError, TypeError, IndexError, ZeroDivisionError, RecursionError) as e:
            self.close()
            raise ConfigError(f"{path} is damaged or cut short near byte {self._at}: {e}") from e
        except ConfigError:
            self.close()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Unmap. Views from `read` must be gone. May be called twice."""
        self._map.close()

    @property
    def num_bytes(self) -> int:
        """Size of the file."""
        return len(self._map)

    def read(self, offset: int, num_bytes: int) -> bytes:
        """A copy of some bytes.

        Raises:
            ConfigError: they reach past the end of the file.
        """
        if offset + num_bytes > len(self._map):
            raise ConfigError(
                f"{self.path} is cut short: data to byte {offset + num_bytes} expected, has {len(self._map)}"
            )
        return self._map[offset : offset + num_bytes]

    def release(self, offset: int, num_bytes: int) -> None:
        """Drop mapped pages that have been read, so that they do not count as this process's memory."""
        start = -(-offset // mmap.PAGESIZE) * mmap.PAGESIZE
        length = (offset + num_bytes - start) // mmap.PAGESIZE * mmap.PAGESIZE
        if length > 0:
            self._map.madvise(mmap.MADV_DONTNEED, start, length)

    def _parse(self) -> None:
        if self._map[:4] != MAGIC:
            raise ConfigError(f"{self.path} is not a GGUF file: it begins with {self._map[:4]!r}")
        self._at = 4
        version = self._scalar("I")
        if version not in VERSIONS:
            raise ConfigError(f"{self.path} has GGUF version {version}; known are {VERSIONS}")
        num_tensors, num_keys = self._scalar("Q"), self._scalar("Q")
        for _ in range(num_keys):
            key = self._string()
            self.metadata[key] = self._value(self._scalar("I"))
        described = [self._tensor() for _ in range(num_tensors)]
        alignment = int(self.metadata.get("general.alignment", DEFAULT_ALIGNMENT))
        data_at = -(-self._at // alignment) * alignment
        for name, type_id, shape, offset in described:
            if not shape or 0 in shape:
                raise ConfigError(f"{self.path} has the empty tensor {name}")
            self.tensors[name] = GgufTensor(name, type_id, shape, data_at + offset)

    def _tensor(self) -> tuple[str, int, tuple[int, ...], int]:
        name = self._string()
        num_dims = self._scalar("I")
        shape = self._scalars("Q", num_dims)[::-1]  # ggml counts the fastest axis first
        return name, self._scalar("I"), shape, self._scalar("Q")

    def _value(self, kind: int) -> Any:
        if kind == _STRING:
            return self._string()
        if kind == _ARRAY:
            kind, count = self._scalar("I"), self._scalar("Q")
            if kind in _SCALARS:
                return list(self._scalars(_SCALARS[kind], count))
            return [self._value(kind) for _ in range(self._checked(count))]
        if kind not in _SCALARS:
            raise ConfigError(f"{self.path} has a value of the unknown type {kind} near byte {self._at}")
        return self._scalar(_SCALARS[kind])

    def _string(self) -> str:
        length = self._checked(self._scalar("Q"))
        begin, self._at = self._at, self._at + length
        return self._map[begin : self._at].decode()

    def _scalar(self, code: str) -> Any:
        return self._scalars(code, 1)[0]

    def _scalars(self, code: str, count: int) -> tuple[Any, ...]:
        layout = f"<{self._checked(count)}{code}"
        values = struct.unpack_from(layout, self._map, self._at)
        self._at += struct.calcsize(layout)
        return values

    def _checked(self, count: int) -> int:
        """A count that the rest of the file could hold, so that damage cannot ask for endless memory."""
        if count > len(self._map) - self._at:
            raise IndexError(f"{count} elements announced, {len(self._map) - self._at} bytes left")
        return count
