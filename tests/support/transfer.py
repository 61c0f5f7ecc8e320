"""Builders for tests of KV transfer, and the contract that every transport keeps."""

import time
from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from disagg.kv.layout import PageLayout
from disagg.protocol import PROTOCOL_VERSION, KvLayout, PeerHello
from disagg.transfer.base import (
    Notified,
    Transport,
    TransportEvent,
    Write,
    WriteEnded,
)
from disagg.transfer.plan import plan_transfer

Pool = NDArray[np.uint8]
MakeTransport = Callable[[str, int, Pool], Transport]
"""`(uuid, rank, pool)`."""


def make_layout(num_kv_heads: int = 6, tp_size: int = 1, **changes: Any) -> KvLayout:
    """A page of 6 heads is 3 KiB: small, and divisible by 1, 2, 3 and 6."""
    fields = {"page_size": 4, "num_layers": 2, "head_dim": 8, "dtype": "float32"} | changes
    return KvLayout(num_kv_heads=num_kv_heads, tp_size=tp_size, **fields)


def make_pool(layout: KvLayout, num_pages: int = 16, seed: int | None = None) -> Pool:
    """One rank's pool, `[page, bytes]`: zeros, or random bytes of a seed."""
    shape = (num_pages, PageLayout.of(layout).page_bytes)
    if seed is None:
        return np.zeros(shape, np.uint8)
    return np.random.default_rng(seed).integers(0, 256, shape, np.uint8)


def make_hello(worker_id: str, uuid: str, layout: KvLayout, transports: list[Transport]) -> PeerHello:
    endpoints = [transport.endpoint() for transport in transports]
    return PeerHello(PROTOCOL_VERSION, worker_id, uuid, layout, endpoints, "host", [])


def poll_until(
    condition: Callable[[list[TransportEvent]], bool], *transports: Transport, limit_s: float = 10.0
) -> list[TransportEvent]:
    """Progress both sides until the first one's events satisfy the condition."""
    events: list[TransportEvent] = []
    until = time.monotonic() + limit_s
    while not condition(events):
        assert time.monotonic() < until, f"only {events} within {limit_s} s"
        events += transports[0].poll()
        for transport in transports[1:]:
            transport.poll()
    return events


def ended(events: list[TransportEvent]) -> list[WriteEnded]:
    return [event for event in events if isinstance(event, WriteEnded)]


def notified(events: list[TransportEvent]) -> list[Notified]:
    return [event for event in events if isinstance(event, Notified)]


def write_of(layout: KvLayout, peer_uuid: str, source_pages: list[int], target_pages: list[int]) -> Write:
    return Write(peer_uuid, 0, plan_transfer(layout, 0, layout, 0, source_pages, target_pages))
