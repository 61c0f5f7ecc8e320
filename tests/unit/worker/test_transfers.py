"""All ranks' transfer threads as one."""

from disagg.errors import LinkLost
from disagg.protocol import KvLayout, PeerHello
from disagg.transfer import AwaitKv, Command, Connect, Connected, ConnectFailed, Drain, Drained
from disagg.worker.transfers import Transfers

HELLO = PeerHello(1, "d", "peer", KvLayout(16, 6, 3, 16, "float32", 2), [], "host", [])


class Port:
    def __init__(self) -> None:
        self.commands: list[Command] = []

    def submit(self, command: Command) -> None:
        self.commands.append(command)


def test_every_rank_is_told() -> None:
    ports = [Port(), Port(), Port()]
    Transfers(ports).submit(AwaitKv(1))
    assert [port.commands for port in ports] == [[AwaitKv(1)]] * 3


def test_connected_when_all_ranks_are() -> None:
    transfers = Transfers([Port(), Port()])
    transfers.connect(Connect(HELLO))
    assert [transfers.connected(rank, Connected("peer")) for rank in (1, 1, 0, 0)] == [
        False,
        False,
        True,
        False,
    ]


def test_one_rank_that_cannot_connect_fails_once_for_all() -> None:
    transfers = Transfers([Port(), Port()])
    transfers.connect(Connect(HELLO))
    failed = ConnectFailed("peer", LinkLost(""))
    assert [transfers.connect_failed(failed), transfers.connect_failed(failed)] == [True, False]
    assert not transfers.connected(0, Connected("peer"))


def test_a_second_try_counts_anew() -> None:
    transfers = Transfers([Port(), Port()])
    transfers.connect(Connect(HELLO))
    transfers.connected(0, Connected("peer"))
    transfers.connect(Connect(HELLO))
    assert not transfers.connected(1, Connected("peer"))


def test_drained_when_all_ranks_are_each_attempt_for_itself() -> None:
    ports = [Port(), Port()]
    transfers = Transfers(ports)
    transfers.drain(("a", 0))
    transfers.drain(("b", 1))
    first, second = (command.token for command in ports[0].commands if isinstance(command, Drain))
    assert transfers.drained(0, Drained(first)) is None
    assert transfers.drained(0, Drained(second)) is None
    assert transfers.drained(1, Drained(second)) == ("b", 1)
    assert transfers.drained(1, Drained(first)) == ("a", 0)
