"""Real NIXL between real processes: every pair of tensor-parallel sizes, and every kind of death."""

import os
import signal
import time
from collections.abc import Callable, Iterator, Mapping

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from disagg.errors import LinkLost, TransferError, TransferTimeout
from disagg.kv.layout import PageLayout
from disagg.protocol import PROTOCOL_VERSION, KvLayout, PeerHello
from disagg.transfer import (
    AbortPush,
    Arrived,
    AwaitKv,
    Connect,
    Connected,
    Disconnect,
    Drain,
    Drained,
    Fenced,
    FinishPush,
    PushChunk,
    PushComplete,
    PushFailed,
    expected_bytes,
    is_process_gone,
    pairs,
    process_start_time,
)
from support.gpu import needs_nccl
from support.kv_ranks import DEVICE, TRANSPORT, Rank, hello_of
from support.system import eventually
from support.transfer import make_layout

KEY = ("t", 1)
NUM_PAGES = 16
BIG = make_layout(num_kv_heads=6, num_layers=8, page_size=16, head_dim=64)
"""393 KiB a page: pushes that last long enough to be interrupted."""
on_gpu = (pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="torch finds no GPU"))
TCP = {"UCX_TLS": "tcp,self"}
LANES = [
    pytest.param({}, id="same host"),
    pytest.param(TCP, id="tcp"),
    pytest.param({DEVICE: "cuda"}, id="gpu", marks=on_gpu),
]
"""What UCX chooses by itself on one host, what it has between hosts without RDMA, and pools on one GPU."""
CUDA_IPC = pytest.param({DEVICE: "cuda", TRANSPORT: "cuda_ipc"}, id="cuda_ipc", marks=on_gpu)
NCCL = [
    pytest.param({TRANSPORT: "nccl"}, id="nccl over sockets"),
    pytest.param({TRANSPORT: "nccl", DEVICE: "cuda"}, id="nccl", marks=(*on_gpu, needs_nccl(2))),
]
by_lane = pytest.mark.parametrize("environ", [*LANES, *NCCL])
by_every_lane = pytest.mark.parametrize("environ", [*LANES, CUDA_IPC, *NCCL])

Bytes = NDArray[np.uint8]
MakeRank = Callable[..., Rank]


@pytest.fixture
def make_rank() -> Iterator[MakeRank]:
    made: list[Rank] = []

    def make(uuid: str, rank: int, layout: KvLayout, **options: object) -> Rank:
        made.append(Rank(uuid, rank, layout, **({"num_pages": NUM_PAGES} | options)))  # type: ignore[arg-type]
        return made[-1]

    yield make
    for rank in made:
        rank.stop()


def whole_pages(members: list[Rank], layout: KvLayout) -> Bytes:
    """Put the ranks' shares together, `[page, kv_head, bytes]`: heads are outermost in a page."""
    head_bytes = PageLayout.of(layout).head_bytes
    shares = [member.pages().reshape(NUM_PAGES, -1, head_bytes) for member in members]
    return np.concatenate(shares, axis=1)


def push(
    source: Rank, target_uuid: str, pages: list[int], targets: list[int], within_s: float = 30.0
) -> None:
    source.submit(
        PushChunk(KEY, target_uuid, pages, targets, time.monotonic() + within_s),
        FinishPush(KEY, token_id=7, position=0, finished=False),
    )


@pytest.mark.parametrize("environ", [LANES[0], LANES[2], CUDA_IPC, *NCCL])
@pytest.mark.parametrize(("source_tp", "target_tp"), [(1, 2), (2, 1), (2, 2), (3, 1), (1, 3)])
def test_pages_arrive_byte_by_byte_whatever_the_tensor_parallel_sizes(
    make_rank: MakeRank, source_tp: int, target_tp: int, environ: Mapping[str, str]
) -> None:
    """Nothing is permuted or staged, so a wrong offset would be served as wrong text."""
    here, there = make_layout(tp_size=source_tp), make_layout(tp_size=target_tp)
    sources = [make_rank("p", rank, here, seed=rank + 1, environ=environ) for rank in range(source_tp)]
    targets = [make_rank("d", rank, there, environ=environ) for rank in range(target_tp)]
    hello = hello_of("decode-0", "d", there, targets)
    for target in targets:
        target.submit(AwaitKv(+1))
    chunks = [([5, 6, 7, 2], [0, 1, 9, 3]), ([11], [15]), ([1, 0], [4, 5])]
    deadline = time.monotonic() + 30.0
    for source in sources:
        _ = source.endpoint
        source.submit(Connect(hello))
        source.submit(*(PushChunk(KEY, "d", pages, where, deadline) for pages, where in chunks))
        source.submit(FinishPush(KEY, token_id=7, position=3, finished=True))
    for source in sources:
        assert source.expect(Connected).peer_uuid == "d"
        assert source.expect(PushComplete).num_pages == 7
    arrived = [event for target in targets for event in arrivals(target, source_tp, target_tp)]
    assert {(e.done.source_rank, e.done.target_rank): e.done.num_bytes for e in arrived} == expected_bytes(
        here, there, 7
    )
    assert {(e.source_uuid, e.done.token_id, e.done.position, e.done.finished) for e in arrived} == {
        ("p", 7, 3, True)
    }
    assert {e.done.transport for e in arrived} == {environ.get(TRANSPORT, "nixl")}
    expected = np.zeros((NUM_PAGES, 6, PageLayout.of(here).head_bytes), np.uint8)
    for pages, where in chunks:
        expected[where] = whole_pages(sources, here)[pages]
    np.testing.assert_array_equal(whole_pages(targets, there), expected)


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="torch finds no second GPU")
@pytest.mark.parametrize("environ", [CUDA_IPC])
def test_pages_reach_another_gpu(make_rank: MakeRank, environ: Mapping[str, str]) -> None:
    """Also one that the sender does not see: a worker is shown its own GPU alone."""
    source = make_rank("p", 0, BIG, seed=1, environ={**environ, "CUDA_VISIBLE_DEVICES": "0"})
    target = make_rank("d", 0, BIG, environ={**environ, "CUDA_VISIBLE_DEVICES": "1"})
    hello = hello_of("decode-0", "d", BIG, [target])
    _ = source.endpoint
    target.submit(AwaitKv(+1))
    source.submit(Connect(hello))
    source.expect(Connected)
    push(source, "d", [5, 6, 7, 2], [0, 1, 9, 3])
    source.expect(PushComplete)
    assert target.expect(Arrived).done.transport == "cuda_ipc"
    np.testing.assert_array_equal(target.pages()[[0, 1, 9, 3]], source.pages()[[5, 6, 7, 2]])


def arrivals(target: Rank, source_tp: int, target_tp: int) -> list[Arrived]:
    rank = target.endpoint.rank
    return [target.expect(Arrived) for pair in pairs(source_tp, target_tp) if pair[1] == rank]


def busy_push(source: Rank, deadline_s: float, num_chunks: int = 300) -> None:
    """Much more than fits the time until the test interferes: 1.9 GB."""
    deadline = time.monotonic() + deadline_s
    pages = list(range(NUM_PAGES))
    source.submit(*(PushChunk(KEY, "d", pages, pages, deadline) for _ in range(num_chunks)))


def start_busy_push(
    make_rank: MakeRank, environ: Mapping[str, str], deadline_s: float = 8.0
) -> tuple[Rank, Rank]:
    """A push between two processes whose first bytes have landed."""
    source = make_rank("p", 0, BIG, seed=1, environ=environ)
    target = make_rank("d", 0, BIG, environ=environ)
    hello = hello_of("decode-0", "d", BIG, [target])
    target.submit(AwaitKv(+1))
    _ = source.endpoint
    source.submit(Connect(hello))
    source.expect(Connected)
    busy_push(source, deadline_s)
    eventually(lambda: target.pages().any(), "the first bytes of a push")
    return source, target


@by_lane
def test_killed_decode_worker_fails_the_push_and_fences_it(
    make_rank: MakeRank, environ: Mapping[str, str]
) -> None:
    """Bounded, and the survivor serves on: a push to another worker succeeds."""
    source, target = start_busy_push(make_rank, environ)
    target.kill()
    killed_at = time.monotonic()
    failed = source.expect(PushFailed)
    assert isinstance(failed.error, TransferError)
    if not failed.fenced:
        assert source.expect(Fenced).key == KEY
    # Seen: 0.03 s and 1.0 s, which is the time after which broken writes have settled.
    assert time.monotonic() - killed_at < 5.0
    other = make_rank("d2", 0, BIG, environ=environ)
    # The same worker after a restart: nobody has to say that the old process is gone.
    source.submit(Connect(hello_of("decode-0", "d2", BIG, [other])))
    source.expect(Connected)
    other.submit(AwaitKv(+1))
    source.submit(
        PushChunk(("t", 2), "d2", [3], [4], time.monotonic() + 30.0), FinishPush(("t", 2), 1, 0, False)
    )
    source.expect(PushComplete)
    assert other.expect(Arrived).done.generation == 2
    np.testing.assert_array_equal(other.pages()[4], source.pages()[3])


@by_every_lane
def test_killed_prefill_worker_is_fenced_by_its_death(
    make_rank: MakeRank, environ: Mapping[str, str]
) -> None:
    """After the proof and a drain the pages do not change any more, and can be given to another."""
    source, target = start_busy_push(make_rank, environ)
    started_at = process_start_time(source.pid)
    assert started_at is not None
    assert not is_process_gone(source.pid, started_at)
    source.kill()
    assert is_process_gone(source.pid, started_at)
    target.submit(Drain("gone"))
    assert target.expect(Drained).token == "gone"
    before = target.pages()
    other = make_rank("p2", 0, BIG, seed=2, environ=environ)
    _ = other.endpoint
    other.submit(Connect(hello_of("decode-0", "d", BIG, [target])))
    other.expect(Connected)
    push(other, "d", [0, 1], [8, 9])
    other.expect(PushComplete)
    assert target.expect(Arrived).source_uuid == "p2"
    after = target.pages()
    np.testing.assert_array_equal(after[[8, 9]], other.pages()[[0, 1]])
    untouched = [page for page in range(NUM_PAGES) if page not in (8, 9)]
    np.testing.assert_array_equal(after[untouched], before[untouched])


@pytest.mark.parametrize("environ", [CUDA_IPC])
def test_a_mapped_pool_outlives_its_process_and_is_given_back_with_it(
    make_rank: MakeRank, environ: Mapping[str, str]
) -> None:
    """What is written into it harms nobody and fails nothing; forgotten, the GPU has its memory again."""
    source = make_rank("p", 0, BIG, seed=1, environ=environ)
    _ = source.endpoint
    free = source.ask("free_gpu_bytes")
    target = make_rank("d", 0, BIG, num_pages=2048, environ=environ)
    pool_bytes = 2048 * PageLayout.of(BIG).page_bytes
    source.submit(Connect(hello_of("decode-0", "d", BIG, [target])))
    source.expect(Connected)
    busy_push(source, deadline_s=60.0, num_chunks=10)
    target.kill()
    busy_push(source, deadline_s=60.0, num_chunks=10)
    assert free - source.ask("free_gpu_bytes") > 0.9 * pool_bytes
    source.submit(Disconnect("d"))
    failed = source.expect(PushFailed)
    assert isinstance(failed.error, LinkLost)
    if not failed.fenced:
        assert source.expect(Fenced).key == KEY
    eventually(lambda: free - source.ask("free_gpu_bytes") < 0.5 * pool_bytes, "the pool's memory")
    other = make_rank("d2", 0, BIG, environ=environ)
    source.submit(Connect(hello_of("decode-0", "d2", BIG, [other])))
    source.expect(Connected)
    other.submit(AwaitKv(+1))
    source.submit(
        PushChunk(("t", 2), "d2", [3], [4], time.monotonic() + 30.0), FinishPush(("t", 2), 1, 0, False)
    )
    source.expect(PushComplete)
    assert other.expect(Arrived).done.generation == 2
    np.testing.assert_array_equal(other.pages()[4], source.pages()[3])


def test_decode_worker_that_hangs_fails_the_push_at_its_deadline(make_rank: MakeRank) -> None:
    """Not fenced before it goes on: what it has not received yet would land then."""
    source, target = start_busy_push(make_rank, TCP, deadline_s=4.0)
    os.kill(target.pid, signal.SIGSTOP)
    failed = source.expect(PushFailed)
    assert isinstance(failed.error, TransferTimeout | LinkLost)
    os.kill(target.pid, signal.SIGCONT)
    if not failed.fenced:
        assert source.expect(Fenced).key == KEY


@by_every_lane
def test_aborted_push_is_fenced_and_writes_no_more(make_rank: MakeRank, environ: Mapping[str, str]) -> None:
    source, target = start_busy_push(make_rank, environ, deadline_s=60.0)
    source.submit(AbortPush(KEY), FinishPush(KEY, token_id=7, position=0, finished=False))
    assert source.expect(Fenced, within_s=60.0).key == KEY
    target.submit(Drain("fenced"))
    target.expect(Drained)
    before = target.pages()
    source.ask("fill", 9)
    target.submit(Drain("later"))
    target.expect(Drained)
    np.testing.assert_array_equal(target.pages(), before)


@by_lane
def test_peers_that_come_and_go_leave_nothing_behind(make_rank: MakeRank, environ: Mapping[str, str]) -> None:
    """A worker outlives hundreds of others; each must give back its descriptors and threads."""
    layout = make_layout()
    source = make_rank("p", 0, layout, seed=1, environ=environ)
    target = make_rank("host", 0, layout, environ=environ)
    _ = source.endpoint, target.endpoint
    counts = [come_and_go(source, target, layout, round_) for round_ in range(24)]
    assert counts[4:] == [counts[4]] * 20


def come_and_go(source: Rank, target: Rank, layout: KvLayout, round_: int) -> list[int]:
    """One peer's life; how many descriptors and threads are left after it, in both processes."""
    uuid, key = f"d{round_}", ("t", round_)
    endpoint = target.ask("open_another", uuid)
    hello = PeerHello(PROTOCOL_VERSION, "decode-0", uuid, layout, [endpoint], "host", [])
    source.submit(Connect(hello))
    source.expect(Connected)
    target.ask("submit_to", uuid, [AwaitKv(+1)])
    source.submit(PushChunk(key, uuid, [1], [2], time.monotonic() + 30.0), FinishPush(key, 1, 0, False))
    source.expect(PushComplete)
    target.expect(Arrived)
    source.submit(Disconnect(uuid))
    target.ask("close_another", uuid)
    source.submit(Drain(round_))
    source.expect(Drained)
    return [rank.ask(what) for rank in (source, target) for what in ("num_descriptors", "num_threads")]


def test_killed_peers_leave_nothing_behind(make_rank: MakeRank) -> None:
    """They close nothing in order; what they held here is given up when the link is seen to be broken."""
    layout = make_layout()
    target = make_rank("d", 0, layout)
    hello = hello_of("decode-0", "d", layout, [target])
    target.submit(AwaitKv(+1))
    counts = []
    for round_ in range(5):
        source = make_rank(f"p{round_}", 0, layout, seed=1)
        _ = source.endpoint
        source.submit(Connect(hello))
        source.expect(Connected)
        push(source, "d", [1], [2])
        target.expect(Arrived)
        source.kill()
        target.submit(Drain(round_))
        target.expect(Drained)
        counts.append([target.ask("num_descriptors"), target.ask("num_threads")])
    assert counts[1:] == [counts[1]] * 4


def test_idle_ranks_use_no_cpu(make_rank: MakeRank) -> None:
    """Also once links are open; NIXL's own progress thread would take most of a core."""
    layout = make_layout()
    source, target = make_rank("p", 0, layout, seed=1), make_rank("d", 0, layout)
    hello = hello_of("decode-0", "d", layout, [target])
    _ = source.endpoint
    source.submit(Connect(hello))
    source.expect(Connected)
    target.submit(AwaitKv(+1))
    push(source, "d", [1], [2])
    source.expect(PushComplete)
    target.expect(Arrived)
    target.submit(AwaitKv(-1))
    # A sender progresses a while longer, for nothing tells that its notification has left.
    eventually(lambda: source.ask("cpu_share", 0.25) < 0.01, "an idle sender")
    assert target.ask("cpu_share", 0.5) < 0.01
