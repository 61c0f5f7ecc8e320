"""One rank from 1 on: `python -m disagg.worker.rank FD PARENT_PID`. Started by `ranks.py`.

Runs what rank 0 sends, in order, until the link closes. It has no scheduler, no socket of its
own and takes no signals: rank 0 ends it.
"""

import signal
import socket
import sys
from typing import assert_never

import msgspec

from disagg.engine import StepPlan, StepRetired
from disagg.engine.build import Rank, load_rank, pick_device
from disagg.errors import DisaggError, WorkerLost
from disagg.parallel import MeetingStore, TensorParallel
from disagg.supervisor import die_with_parent
from disagg.transfer import TransferThread, prepare_environment
from disagg.worker.addresses import is_local
from disagg.worker.kv_thread import make_transfer_thread
from disagg.worker.rank_link import (
    TO_RANK,
    Channel,
    MeetingAnswer,
    MeetingAsk,
    MeetingPut,
    RankFailed,
    RankReady,
    RankStart,
    Submit,
    from_submit,
    to_happened,
)
from disagg.worker.ranks import LocalPort


def main(arguments: list[str]) -> int:
    """Be a rank until rank 0 closes the link; the exit status says whether all was well."""
    fd, parent_pid = map(int, arguments)
    die_with_parent(parent_pid)
    # A terminal's Ctrl-C reaches the whole process group; draining is rank 0's business.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    channel = Channel(socket.socket(fileno=fd))
    first = channel.receive()
    if first is None:
        return 1
    start = TO_RANK.decode(first)
    assert isinstance(start, RankStart), "rank 0 begins with it"
    try:
        _run(start, channel)
    except DisaggError as error:
        channel.send(msgspec.msgpack.encode(RankFailed(type(error).__name__, str(error))))
        return 1
    return 0


def _run(start: RankStart, channel: Channel) -> None:
    config = start.config
    prepare_environment(loopback_only=is_local(config))
    size = config.engine.tensor_parallel_size
    device = pick_device(config.model.device, start.rank, size // config.nodes.num_nodes)
    group = TensorParallel.join(_meeting(channel), start.rank, size, device=device, host=start.host)
    rank = load_rank(config.model, config.engine, tp=group, device=device)
    transfers = make_transfer_thread(
        rank,
        start.uuid,
        start.rank,
        config.transfer.transport_backend,
        on_event=lambda event: channel.send(to_happened(event)),
        # Closed, the link tells rank 0 that this rank is lost.
        on_crash=lambda error: channel.close(),
    )
    channel.send(msgspec.msgpack.encode(RankReady(transfers.start())))
    try:
        _follow(rank, transfers, channel)
    finally:
        transfers.stop()
        group.close()


def _meeting(channel: Channel) -> MeetingStore:
    """Reach rank 0's table over the link. It is used before anything else comes over it."""

    def put(key: str, value: bytes) -> None:
        channel.send(msgspec.msgpack.encode(MeetingPut(key, value)))

    def get(key: str) -> bytes:
        channel.send(msgspec.msgpack.encode(MeetingAsk(key)))
        payload = channel.receive()
        if payload is None:
            raise WorkerLost("rank 0 is gone")
        message = TO_RANK.decode(payload)
        assert isinstance(message, MeetingAnswer), "rank 0 answers before it sends anything else"
        return message.value

    return MeetingStore(put, get)


def _follow(rank: Rank, thread: TransferThread, channel: Channel) -> None:
    retired = -1
    # Rank 0 has seen the end of the step that it has pages pushed of, but on its own GPU alone.
    port = LocalPort(thread, lambda: rank.runner.wait(retired))
    while (payload := channel.receive()) is not None:
        message = TO_RANK.decode(payload)
        match message:
            case StepPlan():
                rank.runner.launch(message)
            case StepRetired(step):
                retired = step
            case Submit():
                port.submit(from_submit(message))
            case RankStart() | MeetingAnswer():
                raise AssertionError("a rank is started once, and has met the others")
            case _:
                assert_never(message)


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
