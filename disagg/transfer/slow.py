"""Does UCX carry GPU memory at a fraction of what it should? It falls back without a word.

Pushes are watched as they go: nothing is measured for its own sake. A link is slow when the fastest
of its first large writes is, for a GPU that computes may hold up any one of them.
"""

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

SLOW_BYTES_PER_S = 2e9
"""Where a lane reaches into GPU memory even 25 Gbit/s are faster; through host memory UCX makes 0.5e9."""
LARGE_BYTES = 8 << 20
NUM_WRITES = 4
SYS = Path("/sys")


@dataclass(slots=True)
class LinkSpeed:
    """The first large writes to one peer."""

    num_writes: int = 0
    bytes_per_s: float = 0.0
    """Of the fastest."""

    def on_write(self, num_bytes: int, seconds: float) -> bool:
        """Take note of a write that has landed; True once, when it shows that the link is slow."""
        if num_bytes < LARGE_BYTES or self.num_writes == NUM_WRITES:
            return False
        self.num_writes += 1
        self.bytes_per_s = max(self.bytes_per_s, num_bytes / max(seconds, 1e-9))
        return self.num_writes == NUM_WRITES and self.bytes_per_s < SLOW_BYTES_PER_S


@dataclass(frozen=True, slots=True)
class LinkFacts:
    """What decides by which lane UCX can reach a peer's GPU memory."""

    is_one_host: bool
    is_one_namespace: bool
    """Of pids, on one host."""
    ucx_tls: str | None
    has_rdma: bool
    has_peermem: bool

    @classmethod
    def of(
        cls,
        host_id: str,
        peer_host_id: str,
        environ: Mapping[str, str] = os.environ,
        sys: Path = SYS,
    ) -> "LinkFacts":
        """Look them up on this host."""
        rdma = sys / "class/infiniband"
        return cls(
            is_one_host=host_id.partition("/")[0] == peer_host_id.partition("/")[0],
            is_one_namespace=host_id == peer_host_id,
            ucx_tls=environ.get("UCX_TLS"),
            has_rdma=rdma.is_dir() and any(rdma.iterdir()),
            has_peermem=(sys / "module/nvidia_peermem").exists(),
        )


def why_slow(facts: LinkFacts) -> str:
    """Name the likeliest cause of a slow link, and what would mend it."""
    lanes = (facts.ucx_tls or "all").split(",")
    if facts.is_one_host:
        if not {"all", "cuda", "cuda_ipc"} & set(lanes) and not lanes[0].startswith("^"):
            return f"UCX_TLS={facts.ucx_tls} leaves out cuda_ipc"
        if not facts.is_one_namespace:
            return (
                "the two are in different PID namespaces, and CUDA IPC works within one: "
                "in Kubernetes set hostPID and hostIPC on both pods"
            )
        return "CUDA IPC does not reach it: it is another user's, or its GPU has no peer access to this one"
    if not facts.has_rdma:
        return "this host has no RDMA device, so pages go through host memory and TCP"
    if not facts.has_peermem:
        return "nvidia_peermem is not loaded, so the RDMA device does not reach the GPU's memory"
    return "the cause is not known; UCX_PROTO_INFO=y makes UCX print what it chose"
