"""Prefill and decode worker: DEALER at the prefill worker, on the decode worker's control socket.

Its routing identity is `peer:` and the prefill worker's uuid. Each side tells the other once
what its KV pool looks like and how each rank's transfer agent is reached; addresses of pages
are then computed from page ids, never sent. The notification that ends a transfer travels by
the KV transport itself, as an encoded PushDone.
"""

from msgspec import Struct


class KvLayout(Struct, frozen=True, array_like=True):
    """What two pools must agree on. `num_kv_heads` counts all ranks' heads, `tp_size` may differ."""

    page_size: int
    num_kv_heads: int
    num_layers: int
    head_dim: int
    dtype: str
    tp_size: int


class RankEndpoint(Struct, frozen=True, array_like=True):
    """How to write into one rank's pool."""

    rank: int
    agent_name: str
    agent_metadata: bytes
    base_address: int
    num_pages: int
    page_bytes: int
    memory: str
    """`DRAM` or `VRAM`."""
    device_id: int
    ipc_handle: bytes = b""
    """CUDA's handle of the allocation that the pool lies in; empty where it has none.."""
    ipc_offset: int = 0
    """Where in it the pool begins."""
    ipc_host: str = ""
    """`host_id` of this rank's process, which may be on another node than rank 0."""


class PeerHello(Struct, frozen=True, array_like=True, tag="peer_hello"):
    """First in both directions; the decode worker answers with its own."""

    protocol_version: int
    worker_id: str
    uuid: str
    layout: KvLayout
    ranks: list[RankEndpoint]
    host_id: str
    """Boot id and pid namespace: where equal, `pids` can be looked up to prove a process gone."""
    pids: list[tuple[int, int]]
    """(pid, start time in clock ticks) of each rank."""


class PeerFence(Struct, frozen=True, array_like=True, tag="peer_fence"):
    """Decode to prefill: tell me when no write of this attempt can still arrive."""

    transfer_id: str
    generation: int


class PeerFenced(Struct, frozen=True, array_like=True, tag="peer_fenced"):
    """Prefill to decode: none can, nor will one be posted."""

    transfer_id: str
    generation: int


class PeerBye(Struct, frozen=True, array_like=True, tag="peer_bye"):
    """The sender refuses or ends the link; `reason` is for the log."""

    reason: str


class PushDone(Struct, frozen=True, array_like=True, tag="push_done"):
    """One (prefill rank, decode rank) pair is complete. Sent after every write has reported done."""

    transfer_id: str
    generation: int
    source_rank: int
    target_rank: int
    num_bytes: int
    token_id: int
    """The token that prefill sampled."""
    position: int
    """Its output position."""
    finished: bool
    """It was the last token: decode only keeps the KV."""
    transport: str = ""
    """What carried it, of its sender's choice.."""


FromPeer = PeerHello | PeerFence | PeerFenced | PeerBye
