"""What the engine thread asks of the loop thread, as records.

The engine thread touches no socket. It collects these while it handles messages and steps, and
hands them over in one batch an iteration, in order.
"""

from collections.abc import Sequence
from typing import NamedTuple

from disagg.protocol import FromPeer, FromWorker, Load, PeerHello, SequenceTokens, Tokens


class ToRouter(NamedTuple):
    """Send to one router; dropped where it is no longer connected."""

    router_id: str
    message: FromWorker


class ToRouters(NamedTuple):
    """Send to every connected router, encoded once."""

    message: FromWorker


class ToPeer(NamedTuple):
    """Answer a prefill worker that has connected to our control socket."""

    uuid: str
    message: FromPeer


class OpenLink(NamedTuple):
    """Connect to a decode worker's control socket and say PeerHello."""

    uuid: str
    address: str
    hello: PeerHello


class OnLink(NamedTuple):
    """Send over a link that we opened."""

    uuid: str
    message: FromPeer


class CloseLink(NamedTuple):
    """End a link that we opened."""

    uuid: str


class Report(NamedTuple):
    """The worker's state as of now: sent to every router, and kept for the heartbeat and the http port."""

    load: Load
    num_held: int
    """Attempts and quarantines: drained when 0."""


Effect = ToRouter | ToRouters | ToPeer | OpenLink | OnLink | CloseLink | Report
Batch = Sequence[Effect]


class Outbox:
    """Collects effects; a step's tokens become one message for each router."""

    def __init__(self) -> None:
        self._effects: list[Effect] = []
        self._tokens: dict[str, list[SequenceTokens]] = {}

    def put(self, effect: Effect) -> None:
        """Add an effect after all that is here."""
        if self._tokens:
            self._flush_tokens()
        self._effects.append(effect)

    def to_router(self, router_id: str, message: FromWorker) -> None:
        """Send to one router."""
        self.put(ToRouter(router_id, message))

    def add_tokens(self, router_id: str, tokens: SequenceTokens) -> None:
        """Add to what this step made for a router."""
        self._tokens.setdefault(router_id, []).append(tokens)

    def take(self) -> list[Effect]:
        """Everything since the last call, in order."""
        self._flush_tokens()
        effects, self._effects = self._effects, []
        return effects

    def _flush_tokens(self) -> None:
        tokens, self._tokens = self._tokens, {}
        for router_id, sequences in tokens.items():
            self._effects.append(ToRouter(router_id, Tokens(sequences)))
