"""Rank 0's side of tensor parallelism: start the other ranks, send them steps, hear their transfers.

A rank is a process of its own with its own share of weights, pool and transfer thread. It dies
with rank 0 (the kernel sees to that), and rank 0 is told of its death at once.
"""

import logging
import os
import socket
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable
from pathlib import Path
from typing import assert_never

import msgspec

from disagg.config import WorkerConfig
from disagg.errors import DisaggError, WorkerLost
from disagg.protocol import RankEndpoint
from disagg.telemetry import fields
from disagg.transfer import Command, Event, PushChunk, TransferThread
from disagg.worker.rank_link import (
    FROM_RANK,
    Channel,
    Happened,
    Progress,
    RankFailed,
    RankReady,
    RankStart,
    from_happened,
    to_error,
    to_submit,
)

log = logging.getLogger(__name__)

OnEvent = Callable[[int, Event], None]
OnLost = Callable[[DisaggError], None]


class LocalPort:
    """This rank's own transfer thread."""

    def __init__(self, thread: TransferThread, before_push: Callable[[], None]) -> None:
        self._thread = thread
        self._before_push = before_push

    def submit(self, command: Command) -> None:
        """Hand over a command; before one that reads pages, wait until they are written."""
        if isinstance(command, PushChunk):
            self._before_push()
        self._thread.submit(command)


class RemoteRank:
    """Another rank's process, and the link to it."""

    def __init__(self, rank: int, process: "subprocess.Popen[bytes]", channel: Channel) -> None:
        self.rank = rank
        self.process = process
        self._channel = channel
        self._ready = threading.Event()
        self._endpoint: RankEndpoint | None = None
        self._error: DisaggError | None = None
        self._is_closing = False

    def submit(self, command: Command) -> None:
        """Hand over a command; lost where the rank is dead, which is told elsewhere."""
        self.send(to_submit(command))

    def send(self, payload: bytes) -> None:
        """Send an encoded plan or command."""
        try:
            self._channel.send(payload)
        except OSError:
            log.debug("a rank is gone %s", fields(rank=self.rank))

    def wait_ready(self) -> RankEndpoint:
        """Wait until the rank is loaded. Raises what it failed with."""
        self._ready.wait()
        if self._error is not None:
            raise self._error
        assert self._endpoint is not None
        return self._endpoint

    def listen(self, on_event: OnEvent, on_lost: OnLost) -> None:
        """Hear the rank until its end; runs in a thread of its own."""
        while (payload := self._channel.receive()) is not None:
            message = FROM_RANK.decode(payload)
            match message:
                case RankReady(endpoint):
                    self._endpoint = endpoint
                    self._ready.set()
                case Happened():
                    on_event(self.rank, from_happened(message))
                case RankFailed(kind, reason):
                    self._error = to_error(kind, reason)
                case Progress():
                    pass  # rank 0 loads as much, and tells of its own
                case _:
                    assert_never(message)
        if self._is_closing:
            return
        status = self.process.wait()
        self._error = self._error or WorkerLost(f"rank {self.rank} ended with status {status}")
        self._ready.set()
        on_lost(self._error)

    def stop(self, timeout_s: float) -> None:
        """End the rank in good order, or kill it."""
        self._is_closing = True
        self._channel.close()
        try:
            self.process.wait(timeout_s)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()


class RankGroup:
    """All ranks but the first. Start it in the main thread, with which the kernel ends the ranks."""

    def __init__(self, config: WorkerConfig, uuid: str, *, on_event: OnEvent, on_lost: OnLost) -> None:
        self.size = config.engine.tensor_parallel_size
        # Rank 0 and its ranks meet over a file that only this user can reach.
        self._folder = tempfile.TemporaryDirectory(prefix="disagg-ranks-")
        self.address = f"file://{Path(self._folder.name) / 'store'}"
        self.ranks: list[RemoteRank] = []
        self._threads: list[threading.Thread] = []
        for rank in range(1, self.size):
            remote = _spawn(rank, RankStart(config, uuid, rank, self.address))
            self.ranks.append(remote)
            self._threads.append(
                threading.Thread(
                    target=remote.listen, args=(on_event, on_lost), name=f"rank-{rank}", daemon=True
                )
            )
        for thread in self._threads:
            thread.start()

    @property
    def pids(self) -> list[int]:
        """Of the ranks from 1 on."""
        return [remote.process.pid for remote in self.ranks]

    def send(self, payload: bytes) -> None:
        """Send an encoded plan to every rank."""
        for remote in self.ranks:
            remote.send(payload)

    def wait_ready(self) -> list[RankEndpoint]:
        """Wait until every rank is loaded; raises what the first one failed with."""
        return [remote.wait_ready() for remote in self.ranks]

    def forget_address(self) -> None:
        """Remove the meeting file: all ranks are joined. Idempotent."""
        self._folder.cleanup()

    def kill(self) -> None:
        """End every rank now. Idempotent."""
        self.stop(timeout_s=0.0)

    def stop(self, timeout_s: float = 5.0) -> None:
        """End every rank; none outlives this call. Idempotent."""
        for remote in self.ranks:
            remote.stop(timeout_s)
        for thread in self._threads:
            thread.join()
        self._folder.cleanup()


def _spawn(rank: int, start: RankStart) -> RemoteRank:
    ours, theirs = socket.socketpair()
    command = [sys.executable, "-m", "disagg.worker.rank", str(theirs.fileno()), str(os.getpid())]
    with theirs:
        process = subprocess.Popen(  # noqa: S603 - our own interpreter and module
            command, pass_fds=[theirs.fileno()], stdin=subprocess.DEVNULL
        )
    channel = Channel(ours)
    channel.send(msgspec.msgpack.encode(start))
    return RemoteRank(rank, process, channel)
