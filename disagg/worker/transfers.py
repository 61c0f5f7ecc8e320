"""All ranks' transfer threads as one: a command goes to every rank, an answer comes when all have given it.

Only what no lease keeps count of is folded here: connections and drains. Engine thread only.
"""

from collections.abc import Sequence
from typing import Protocol

from disagg.transfer import Command, Connect, Connected, ConnectFailed, Drain, Drained
from disagg.worker.leases import Key


class RankPort(Protocol):
    """The way to one rank's transfer thread."""

    def submit(self, command: Command) -> None:
        """Hand over a command; returns at once."""


class Transfers:
    """Fans commands out to the ranks and counts their answers."""

    def __init__(self, ports: Sequence[RankPort]) -> None:
        self._ports = ports
        self._connecting: dict[str, set[int]] = {}
        self._draining: dict[int, tuple[Key, set[int]]] = {}
        self._num_drains = 0

    def submit(self, command: Command) -> None:
        """Have every rank do it."""
        for port in self._ports:
            port.submit(command)

    def connect(self, command: Connect) -> None:
        """Have every rank connect; `connected` or `connect_failed` tells the end."""
        self._connecting[command.peer.uuid] = set()
        self.submit(command)

    def drain(self, key: Key) -> None:
        """Have every rank let land what has reached this host; `drained` tells when all have."""
        self._num_drains += 1
        self._draining[self._num_drains] = (key, set())
        self.submit(Drain(self._num_drains))

    def connected(self, rank: int, event: Connected) -> bool:
        """Count a rank in; True once, when all of them are connected."""
        ranks = self._connecting.get(event.peer_uuid)
        if ranks is None or not self._agree(ranks, rank):
            return False
        del self._connecting[event.peer_uuid]
        return True

    def connect_failed(self, event: ConnectFailed) -> bool:
        """True for the first rank that fails."""
        return self._connecting.pop(event.peer_uuid, None) is not None

    def drained(self, rank: int, event: Drained) -> Key | None:
        """Count a rank in; the attempt that was drained for, once all ranks have."""
        token = event.token
        assert isinstance(token, int), "tokens are minted here"
        key, ranks = self._draining[token]
        if not self._agree(ranks, rank):
            return None
        del self._draining[token]
        return key

    def _agree(self, ranks: set[int], rank: int) -> bool:
        ranks.add(rank)
        return len(ranks) == len(self._ports)
