"""Decode workers that this one pushes to: a link, a hello each way, a connection of every rank.

A target is a process, not an address: one that comes back has a new uuid and is another target.
Engine thread only.
"""

import logging
from collections.abc import Callable
from enum import Enum, auto

from disagg.errors import LayoutMismatch
from disagg.protocol import PROTOCOL_VERSION, PeerHello
from disagg.transfer import Connect, Disconnect, check_hello
from disagg.worker.outbox import CloseLink, OpenLink, Outbox
from disagg.worker.transfers import Transfers

log = logging.getLogger(__name__)

OPEN_TIMEOUT_S = 20.0
"""Without an answer for so long the address reaches nobody. It outlasts a step on either side, since
both answer between two steps; that a process has ended is learnt at once, from its link."""


class _State(Enum):
    OPENING = auto()
    """Our hello is on its way."""
    CONNECTING = auto()
    """The transfer threads take in its hello."""
    READY = auto()


class _Target:
    def __init__(self, opened_at: float) -> None:
        self.state = _State.OPENING
        self.opened_at = opened_at


class Targets:
    """What each target's link has come to. Those that fail are forgotten and may be opened again."""

    def __init__(
        self, own_hello: PeerHello, transfers: Transfers, outbox: Outbox, clock: Callable[[], float]
    ) -> None:
        self._own_hello = own_hello
        self._transfers = transfers
        self._outbox = outbox
        self._clock = clock
        self._targets: dict[str, _Target] = {}
        self.mismatched: dict[str, str] = {}
        """Processes whose pages are not ours, and what differs; refused without asking again."""

    def open(self, uuid: str, address: str) -> None:
        """Get ready to push to a process; nothing where that has begun."""
        if uuid not in self._targets:
            self._targets[uuid] = _Target(self._clock())
            self._outbox.put(OpenLink(uuid, address, self._own_hello))

    @property
    def uuids(self) -> list[str]:
        """Targets with an open link."""
        return list(self._targets)

    def has_link(self, uuid: str) -> bool:
        """Whether a link to that process is open."""
        return uuid in self._targets

    def is_ready(self, uuid: str) -> bool:
        """Whether every rank can push to it."""
        target = self._targets.get(uuid)
        return target is not None and target.state is _State.READY

    def on_hello(self, uuid: str, hello: PeerHello) -> str | None:
        """Take in a target's answer; returns why it is none, or None."""
        target = self._targets.get(uuid)
        if target is None or target.state is not _State.OPENING:
            return None
        if hello.uuid != uuid:
            return "peer_lost: another process answers at its address"
        if hello.protocol_version != PROTOCOL_VERSION:
            return f"peer_unreachable: its protocol version is {hello.protocol_version}"
        try:
            check_hello(self._own_hello.layout, hello)
        except LayoutMismatch as error:
            self.mismatched[uuid] = str(error)
            return f"layout_mismatch: {error}"
        target.state = _State.CONNECTING
        self._transfers.connect(Connect(hello))
        return None

    def on_bye(self, uuid: str, reason: str) -> None:
        """A target refuses us; where its pages are not ours it always will."""
        if uuid in self._targets and reason.startswith("layout_mismatch"):
            self.mismatched[uuid] = reason

    def on_connected(self, uuid: str) -> None:
        """Every rank has taken its hello in."""
        target = self._targets.get(uuid)
        if target is not None:
            target.state = _State.READY

    def forget(self, uuid: str) -> None:
        """Give up a target and what is open to it. Idempotent."""
        target = self._targets.pop(uuid, None)
        if target is None:
            return
        if target.state is not _State.OPENING:
            self._transfers.submit(Disconnect(uuid))
        self._outbox.put(CloseLink(uuid))

    def overdue(self) -> list[str]:
        """Targets that have not answered in time."""
        before = self._clock() - OPEN_TIMEOUT_S
        return [
            uuid
            for uuid, target in self._targets.items()
            if target.state is _State.OPENING and target.opened_at <= before
        ]
