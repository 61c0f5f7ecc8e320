"""Ranks of workers as real processes, each with a `TransferThread` and a pool of its own.

The test's process asks and a rank answers, over a pipe; a rank ends with its parent.
"""

import multiprocessing
import os
import queue
import time
from collections.abc import Mapping, Sequence
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from typing import Any, TypeVar

import numpy as np

from disagg.kv.layout import PageLayout
from disagg.protocol import PROTOCOL_VERSION, KvLayout, PeerHello, RankEndpoint
from disagg.transfer import (
    Command,
    Event,
    PoolMemory,
    TransferThread,
    host_id,
    make_transport,
    prepare_environment,
    process_start_time,
)
from disagg.transfer.base import Transport
from disagg.transfer.nccl import NcclTransport
from support.socket_wire import SocketWire, new_id

DEVICE = "KV_RANKS_DEVICE"
"""In a rank's environment: `cuda` puts its pool on the GPU."""
TRANSPORT = "KV_RANKS_TRANSPORT"
"""In a rank's environment: its transport, `nixl` where it is not set."""

E = TypeVar("E")
_SPAWN = multiprocessing.get_context("spawn")


class Rank:
    """One rank's process, as the test sees it."""

    def __init__(
        self,
        uuid: str,
        rank: int,
        layout: KvLayout,
        num_pages: int,
        *,
        seed: int | None = None,
        environ: Mapping[str, str] | None = None,
    ) -> None:
        self._pipe, theirs = _SPAWN.Pipe()
        self.process: BaseProcess = _SPAWN.Process(
            target=_be_rank,
            args=(theirs, uuid, rank, layout, num_pages, seed, dict(environ or {})),
            name=f"{uuid}:{rank}",
            daemon=True,
        )
        self.process.start()
        theirs.close()
        self._endpoint: RankEndpoint | None = None

    @property
    def endpoint(self) -> RankEndpoint:
        """Waits until the rank is up; start several and then ask."""
        if self._endpoint is None:
            endpoint = self._pipe.recv()
            assert isinstance(endpoint, RankEndpoint), endpoint
            self._endpoint = endpoint
        return self._endpoint

    @property
    def pid(self) -> int:
        assert self.process.pid is not None
        return self.process.pid

    def ask(self, name: str, *args: Any) -> Any:
        """Run one of the functions of `_Answers` there."""
        self._pipe.send((name, *args))
        answer = self._pipe.recv()
        if isinstance(answer, BaseException):
            raise answer
        return answer

    def submit(self, *commands: Command) -> None:
        self.ask("submit", commands)

    def submit_at(self, at: float, *commands: Command) -> None:
        """Submit at an instant of the monotonic clock, without waiting for it here."""
        self._pipe.send(("submit", commands, at))

    def submitted(self) -> None:
        """Wait until the commands of `submit_at` have been handed over."""
        assert self._pipe.recv() is None

    def expect_at(self, kind: type[E], within_s: float = 20.0) -> tuple[E, float]:
        """The next event, which must be of this kind, and the monotonic instant at which it came."""
        answer = self.ask("next_event", within_s)
        assert answer is not None, f"{self.process.name}: no {kind.__name__} within {within_s} s"
        event, at = answer
        assert isinstance(event, kind), f"{self.process.name}: {event!r} instead of {kind.__name__}"
        return event, at

    def expect(self, kind: type[E], within_s: float = 20.0) -> E:
        """The next event, which must be of this kind."""
        return self.expect_at(kind, within_s)[0]

    def pages(self) -> np.ndarray[Any, np.dtype[np.uint8]]:
        """The whole pool, `[page, bytes]`."""
        pool: np.ndarray[Any, np.dtype[np.uint8]] = self.ask("pages")
        return pool

    def kill(self) -> None:
        """As kill -9 does, and wait until it is gone."""
        self.process.kill()
        self.process.join()

    def stop(self) -> None:
        """End in peace, or by force where it has died or hangs."""
        if self.process.is_alive():
            self._pipe.close()
            self.process.join(10.0)
        if self.process.is_alive():
            self.kill()
        self._pipe.close()


def hello_of(worker_id: str, uuid: str, layout: KvLayout, members: Sequence[Rank]) -> PeerHello:
    """What this worker tells its peers."""
    pids = [(member.pid, process_start_time(member.pid) or 0) for member in members]
    endpoints = [member.endpoint for member in members]
    return PeerHello(PROTOCOL_VERSION, worker_id, uuid, layout, endpoints, host_id(), pids)


# In the process


class _Answers:
    def __init__(
        self, uuid: str, rank: int, layout: KvLayout, num_pages: int, seed: int | None, pipe: Connection
    ) -> None:
        shape = (num_pages, PageLayout.of(layout).page_bytes)
        self.pool = np.zeros(shape, np.uint8)
        if seed is not None:
            self.pool[:] = np.random.default_rng(seed).integers(0, 256, shape, np.uint8)
        self.on_gpu = _on_gpu(self.pool) if os.environ.get(DEVICE) == "cuda" else None
        self.layout, self.rank, self.num_pages = layout, rank, num_pages
        self.events: queue.SimpleQueue[tuple[Event, float]] = queue.SimpleQueue()
        self.main, endpoint = self._make(uuid)
        self.others: dict[str, TransferThread] = {}
        pipe.send(endpoint)

    def _make(self, uuid: str) -> tuple[TransferThread, RankEndpoint]:
        memory = PoolMemory.of_array(self.pool) if self.on_gpu is None else PoolMemory.of_tensor(self.on_gpu)
        thread = TransferThread(
            lambda: _transport(os.environ.get(TRANSPORT, "nixl"), uuid, self.rank, memory),
            self.layout,
            self.rank,
            lambda event: self.events.put((event, time.monotonic())),
            lambda error: os.abort(),
        )
        return thread, thread.start()

    def submit(self, commands: Sequence[Command], at: float = 0.0) -> None:
        time.sleep(max(0.0, at - time.monotonic()))
        for command in commands:
            self.main.submit(command)

    def next_event(self, within_s: float) -> tuple[Event, float] | None:
        try:
            return self.events.get(timeout=within_s)
        except queue.Empty:
            return None

    def pages(self) -> np.ndarray[Any, np.dtype[np.uint8]]:
        return self.pool if self.on_gpu is None else self.on_gpu.cpu().numpy()

    def fill(self, seed: int) -> None:
        self.pool[:] = np.random.default_rng(seed).integers(0, 256, self.pool.shape, np.uint8)
        if self.on_gpu is not None:
            self.on_gpu = _on_gpu(self.pool, self.on_gpu)

    def open_another(self, uuid: str) -> RankEndpoint:
        """A second transfer agent over the same pool: a peer that comes and goes, without a process."""
        self.others[uuid], endpoint = self._make(uuid)
        return endpoint

    def submit_to(self, uuid: str, commands: Sequence[Command]) -> None:
        for command in commands:
            self.others[uuid].submit(command)

    def close_another(self, uuid: str) -> None:
        self.others.pop(uuid).stop()

    def num_descriptors(self) -> int:
        return len(os.listdir("/proc/self/fd"))

    def free_gpu_bytes(self) -> int:
        import torch

        return torch.cuda.mem_get_info()[0]

    def num_threads(self) -> int:
        return len(os.listdir("/proc/self/task"))

    def cpu_share(self, over_s: float) -> float:
        """CPU seconds a second of this process while it waits here."""
        before, began = time.process_time(), time.monotonic()
        time.sleep(over_s)
        return (time.process_time() - before) / (time.monotonic() - began)


def _transport(name: str, uuid: str, rank: int, pool: PoolMemory) -> Transport:
    if name != "nccl" or pool.memory == "VRAM":
        return make_transport(name, uuid=uuid, rank=rank, pool=pool)
    nixl = make_transport("nixl", uuid=uuid, rank=rank, pool=pool)
    return NcclTransport(nixl, pool, make_wire=SocketWire, make_id=new_id)


def _on_gpu(pool: np.ndarray[Any, np.dtype[np.uint8]], into: Any = None) -> Any:
    import torch

    into = torch.empty(pool.shape, dtype=torch.uint8, device="cuda") if into is None else into
    into.copy_(torch.from_numpy(pool))
    torch.cuda.synchronize()
    return into


def _be_rank(
    pipe: Connection,
    uuid: str,
    rank: int,
    layout: KvLayout,
    num_pages: int,
    seed: int | None,
    environ: dict[str, str],
) -> None:
    os.environ.update(environ)
    prepare_environment()
    answers = _Answers(uuid, rank, layout, num_pages, seed, pipe)
    try:
        while True:
            name, *args = pipe.recv()
            try:
                pipe.send(getattr(answers, name)(*args))
            except Exception as error:
                pipe.send(error)
    except EOFError:
        answers.main.stop()
