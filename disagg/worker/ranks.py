"""Rank 0's side of tensor parallelism: start the other ranks, send them steps, hear their transfers.

A rank is a process of its own with its own share of weights, pool and transfer thread. It dies
with rank 0 (the kernel sees to that, or its node's agent), and rank 0 is told of its death at once.
"""

import logging
import os
import socket
import subprocess
import sys
import threading
from collections.abc import Callable
from typing import Protocol, assert_never

import msgspec

from disagg.config import WorkerConfig
from disagg.errors import DisaggError, WorkerLost
from disagg.parallel import Meeting
from disagg.protocol import RankEndpoint
from disagg.telemetry import fields
from disagg.transfer import Command, Event, PushChunk, TransferThread
from disagg.worker.nodes import NodeLinks, ranks_of
from disagg.worker.rank_link import (
    FROM_RANK,
    Channel,
    Happened,
    MeetingAnswer,
    MeetingAsk,
    MeetingPut,
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
LOOPBACK = "127.0.0.1"


class LocalPort:
    """This rank's own transfer thread."""

    def __init__(self, thread: TransferThread, before_push: Callable[[], None] = lambda: None) -> None:
        self._thread = thread
        self._before_push = before_push

    def submit(self, command: Command) -> None:
        """Hand over a command; before one that reads pages, wait until they are written."""
        if isinstance(command, PushChunk):
            self._before_push()
        self._thread.submit(command)


class RankProcess(Protocol):
    """What is done with a rank's process, here or on another node."""

    pid: int

    def wait(self, timeout: float | None = None) -> int:
        """Wait for its end and return its status. Raises `subprocess.TimeoutExpired`."""

    def kill(self) -> None:
        """End it at once, or have it ended."""


class RemoteRank:
    """Another rank's process, and the link to it."""

    def __init__(self, rank: int, process: RankProcess, channel: Channel) -> None:
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

    def listen(self, meeting: Meeting, on_event: OnEvent, on_lost: OnLost) -> None:
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
                case MeetingPut(key, value):
                    meeting.put(key, value)
                case MeetingAsk(key):
                    try:
                        self.send(msgspec.msgpack.encode(MeetingAnswer(meeting.get(key))))
                    except WorkerLost:
                        break
                case _:
                    assert_never(message)
        meeting.close()
        if self._is_closing:
            return
        self._channel.close()
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

    def __init__(
        self,
        config: WorkerConfig,
        uuid: str,
        *,
        on_event: OnEvent,
        on_lost: OnLost,
        nodes: NodeLinks | None = None,
    ) -> None:
        """Start the ranks of this node; `nodes` brings the others, where there are several."""
        self.size = config.engine.tensor_parallel_size
        self.meeting = Meeting()
        """Where all ranks meet, rank 0 included."""
        self._config = config
        self._uuid = uuid
        self._nodes = nodes
        here = ranks_of(0, config.nodes.num_nodes, self.size)
        self.ranks: list[RemoteRank] = []
        for rank in range(1, self.size):
            process: RankProcess
            process, end = spawn_rank() if nodes is None or rank in here else nodes.add(rank)
            self.ranks.append(RemoteRank(rank, process, Channel(end)))
        self._threads = [
            threading.Thread(
                target=remote.listen,
                args=(self.meeting, on_event, on_lost),
                name=f"rank-{remote.rank}",
                daemon=True,
            )
            for remote in self.ranks
        ]
        for thread in self._threads:
            thread.start()
        if nodes is not None:
            nodes.start()

    def begin(self) -> None:
        """Have every rank load, when all are there: other nodes may take long to come."""
        hosts = {} if self._nodes is None else self._nodes.wait_joined()
        for remote in self.ranks:
            host = hosts.get(remote.rank, self.host)
            remote.send(msgspec.msgpack.encode(RankStart(self._config, self._uuid, remote.rank, host)))

    @property
    def host(self) -> str:
        """Interface on which the ranks of this node listen for the others."""
        return LOOPBACK if self._nodes is None else self._config.advertise_host or LOOPBACK

    @property
    def on_one_host(self) -> bool:
        """Whether every rank's process is on this host."""
        return self._nodes is None

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

    def kill(self) -> None:
        """End every rank now. Idempotent."""
        self.stop(timeout_s=0.0)

    def stop(self, timeout_s: float = 5.0) -> None:
        """End every rank; none outlives this call. Idempotent."""
        self.meeting.close()
        for remote in self.ranks:
            remote.stop(timeout_s)
        for thread in self._threads:
            thread.join()
        if self._nodes is not None:
            self._nodes.close()


def spawn_rank() -> tuple["subprocess.Popen[bytes]", socket.socket]:
    """Start a rank's process, which waits to be told who it is, in a thread that outlives it; our end."""
    ours, theirs = socket.socketpair()
    command = [sys.executable, "-m", "disagg.worker.rank", str(theirs.fileno()), str(os.getpid())]
    with theirs:
        process = subprocess.Popen(  # noqa: S603 - our own interpreter and module
            command, pass_fds=[theirs.fileno()], stdin=subprocess.DEVNULL
        )
    return process, ours
