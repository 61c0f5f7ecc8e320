"""What stands for `disagg._cuda.PeerCopier` without a GPU: every "process" is this one."""

import ctypes
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

PREFIX = 64
"""Where a pool lies in its pretended allocation."""


@dataclass(slots=True)
class FakeCopier:
    """Copies when polled, or with `hold` when told; its errors are those that CUDA would give."""

    hold: bool = False
    opened: list[int] = field(default_factory=list)
    """Mapped allocations, as often as they are mapped."""
    copies: list[Callable[[], None]] = field(default_factory=list)
    num_landed: int = 0
    fails: str = ""
    """Words of the next error."""

    def handle(self, address: int) -> tuple[bytes, int]:
        self._fail()
        return (address - PREFIX).to_bytes(8, "little"), PREFIX

    def open(self, handle: bytes, num_bytes: int) -> int:
        self._fail()
        base = int.from_bytes(handle, "little")
        self.opened.append(base)
        return base

    def close(self, base: int) -> None:
        assert self.num_landed == len(self.copies), "unmapped under a copy"
        self.opened.remove(base)

    def copy(
        self,
        source: int,
        target: int,
        source_offsets: NDArray[np.int64],
        target_offsets: NDArray[np.int64],
        lengths: NDArray[np.int64],
    ) -> int:
        self._fail()
        assert target - PREFIX in self.opened, "not mapped"
        rows: list[Any] = list(
            zip(source_offsets.tolist(), target_offsets.tolist(), lengths.tolist(), strict=True)
        )

        def land() -> None:
            for source_offset, target_offset, length in rows:
                ctypes.memmove(target + target_offset, source + source_offset, length)

        self.copies.append(land)
        if not self.hold:
            self.land()
        return len(self.copies) - 1

    def land(self) -> None:
        """Let the oldest copy land."""
        self.copies[self.num_landed]()
        self.num_landed += 1

    def is_done(self, copy: int) -> bool:
        self._fail()
        return copy < self.num_landed

    def wait(self) -> None:
        while self.num_landed < len(self.copies):
            self.land()

    def _fail(self) -> None:
        if self.fails:
            words, self.fails = self.fails, ""
            raise RuntimeError(words)
