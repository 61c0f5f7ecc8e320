"""What a worker's prefix cache holds, told to routers as page hashes.

`epoch` changes when the cache is emptied, `seq` counts deltas within an epoch. A router that
sees a gap asks for a snapshot; a digest that disagrees with its copy is a gap too.
"""

from msgspec import Struct


class SummaryDelta(Struct, frozen=True, array_like=True, tag="summary_delta"):
    """Page hashes stored and removed since `seq - 1`; little-endian uint64 arrays, parents first."""

    epoch: int
    seq: int
    stored: bytes
    removed: bytes


class SummarySnapshot(Struct, frozen=True, array_like=True, tag="summary_snapshot"):
    """All page hashes as of `seq`; parts arrive in order and replace the copy when `last` is set."""

    epoch: int
    seq: int
    hashes: bytes
    last: bool


class SummaryDigest(Struct, frozen=True, array_like=True, tag="summary_digest"):
    """Count and XOR of all page hashes as of `seq`; sent every few seconds."""

    epoch: int
    seq: int
    count: int
    xor: int
