"""What rank 0 and another rank say to each other survives the way, in order."""

import socket
import threading

import pytest

from disagg.config import EngineConfig, WorkerConfig
from disagg.engine import SamplePlan, StepPlan
from disagg.errors import ConfigError, LayoutMismatch, LinkLost, WorkerError
from disagg.protocol import KvLayout, PeerHello, PushDone, RankEndpoint, encode
from disagg.transfer import (
    AbortPush,
    Arrived,
    AwaitKv,
    Connect,
    Connected,
    ConnectFailed,
    Disconnect,
    Drain,
    Drained,
    Fenced,
    FinishPush,
    PushChunk,
    PushComplete,
    PushFailed,
)
from disagg.worker import rank_link
from disagg.worker.rank_link import (
    FROM_RANK,
    TO_RANK,
    Channel,
    RankStart,
    from_happened,
    from_submit,
    to_error,
    to_happened,
    to_submit,
)

KEY = ("t", 3)
HELLO = PeerHello(
    1,
    "decode-0",
    "uuid",
    KvLayout(16, 6, 3, 16, "float32", 2),
    [RankEndpoint(r, f"uuid:{r}", b"\x00\xff", 2**47 + r, 100, 4096, "DRAM", 0) for r in range(2)],
    "host",
    [(10, 2**40), (11, 2**40 + 1)],
)
COMMANDS = [
    Connect(HELLO),
    Disconnect("uuid"),
    PushChunk(KEY, "uuid", [1, 2, 3], [7, 8, 9], 1234.5),
    PushChunk(KEY, "uuid", [], [], 1234.5),
    FinishPush(KEY, 42, 0, True),
    AbortPush(KEY),
    AwaitKv(-1),
    Drain(17),
]
EVENTS = [
    Connected("uuid"),
    ConnectFailed("uuid", LayoutMismatch("page_size is 16 at the source and 8 at the target")),
    PushComplete(KEY, 3, 12288, 0.25, "nixl"),
    PushFailed(KEY, LinkLost("broke"), fenced=False),
    Fenced(KEY),
    Arrived("uuid", PushDone("t", 3, 1, 0, 12288, 42, 0, False)),
    Drained(17),
]


@pytest.mark.parametrize("command", COMMANDS, ids=lambda command: type(command).__name__)
def test_commands_arrive_as_they_were(command: object) -> None:
    assert from_submit(TO_RANK.decode(to_submit(command))) == command


@pytest.mark.parametrize("event", EVENTS, ids=lambda event: type(event).__name__)
def test_events_arrive_as_they_were(event: object) -> None:
    arrived = from_happened(FROM_RANK.decode(to_happened(event)))
    if isinstance(event, ConnectFailed | PushFailed):
        assert (type(arrived.error), str(arrived.error)) == (type(event.error), str(event.error))
        assert arrived.__class__ is event.__class__
    else:
        assert arrived == event


def test_every_kind_has_a_number() -> None:
    """A new command or event would fail only at the first use on a rank other than 0."""
    kinds = {type(message) for message in COMMANDS + EVENTS}
    assert kinds == set(rank_link._KINDS)
    assert kinds == set(rank_link.Command.__args__) | set(rank_link.Event.__args__)


def test_plans_and_the_configuration_share_the_stream() -> None:
    plan = StepPlan(1, 0, 2, b"12345678", b"1234", b"1234", b"1234", b"12345678", b"1234", SamplePlan())
    config = WorkerConfig(role="decode", engine=EngineConfig(tensor_parallel_size=2))
    start = RankStart(config, "uuid", 1, "file:///x")
    assert TO_RANK.decode(encode(plan)) == plan
    assert TO_RANK.decode(encode(start)) == start


def test_errors_keep_their_kind_and_strange_ones_their_name() -> None:
    assert type(to_error("ConfigError", "x")) is ConfigError
    assert isinstance(strange := to_error("ValueError", "x"), WorkerError)
    assert str(strange) == "ValueError: x"


def test_frames_arrive_whole_and_in_order_and_end_with_the_other_side() -> None:
    ours, theirs = (Channel(end) for end in socket.socketpair())
    frames = [b"", b"a", bytes(300_000), b"last"]
    sender = threading.Thread(target=lambda: ([ours.send(frame) for frame in frames], ours.close()))
    sender.start()
    assert [theirs.receive() for _ in frames] == frames
    assert theirs.receive() is None
    sender.join()
    with pytest.raises(OSError):  # noqa: PT011 - broken or reset, as the kernel likes
        theirs.send(bytes(1_000_000))
    theirs.close()
    theirs.close()


def test_a_frame_cut_short_by_death_is_none() -> None:
    ours, theirs = socket.socketpair()
    channel = Channel(theirs)
    ours.sendall((100).to_bytes(4, "little") + b"half")
    ours.close()
    assert channel.receive() is None
    channel.close()
