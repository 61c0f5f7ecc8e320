"""The key ring: CURVE secret keys in a folder, read again when they may have changed.

The folder holds `current`, and during a rotation `next` or `previous`: each 32 random bytes, a secret key
whose public half is derived. One key pair serves every part of a release. A server proves itself with
what `current` was when it started, lets in whoever has any key that is there now, and a client tries all
that are there now. So a rotation needs no downtime: add `next` everywhere; then make it `current`, keep the
old one as `previous` and restart the processes; then drop `previous`.
"""

import logging
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import zmq
from zmq.utils import z85

from disagg.errors import ConfigError
from disagg.security.reloaded import Reloaded

log = logging.getLogger(__name__)

NAMES = ("current", "next", "previous")
"""In the order in which a client tries them."""
KEY_BYTES = 32


@dataclass(frozen=True, slots=True)
class KeyPair:
    """A CURVE key pair, each half 40 characters of Z85 as ZeroMQ takes them."""

    public: bytes
    secret: bytes = field(repr=False)

    @classmethod
    def from_secret(cls, raw: bytes) -> "KeyPair":
        """Derive the public half of 32 secret bytes."""
        secret: bytes = z85.encode(raw)
        return cls(zmq.curve_public(secret), secret)


class KeyRing:
    """The keys of one folder, read again when they may have changed. May be used from any thread."""

    def __init__(self, folder: Path, clock: Callable[[], float] = time.monotonic) -> None:
        """Read the folder; raises `ConfigError` where it has no usable keys."""
        what = f"transport_keys {str(folder)!r}"
        try:
            self._pairs = Reloaded(
                what, lambda: _read(folder), _pairs_of, on_change=self._on_change, clock=clock
            )
        except (OSError, ValueError) as error:
            raise ConfigError(f"{what} cannot be used: {error}") from error
        self.own = self._pairs.get()[0]
        """What a server of this process proves itself with, for as long as the process lives."""

    def pairs(self) -> tuple[KeyPair, ...]:
        """The keys there are now: current, next, previous; each once."""
        return self._pairs.get()

    def accepts(self, public: bytes) -> bool:
        """Whether a client that proved to have this key (Z85) is one of ours."""
        return any(pair.public == public for pair in self.pairs())

    def _on_change(self, pairs: tuple[KeyPair, ...]) -> None:
        if self.own not in pairs:
            log.error(
                "the transport key this process started with is gone: restart it, nobody can connect to it"
            )


class KeyChoice:
    """Which key a client tries on one server; one object a server, kept over its connections."""

    def __init__(self, ring: KeyRing) -> None:
        self._ring = ring
        self._refused: set[KeyPair] = set()
        self._worked: KeyPair | None = None
        self._tried = ring.own

    def take(self) -> KeyPair:
        """Return the key for the next try: the one that worked last, then current, next, previous."""
        pairs = sorted(self._ring.pairs(), key=lambda pair: pair != self._worked)
        self._tried = next((pair for pair in pairs if pair not in self._refused), pairs[0])
        return self._tried

    def on_accepted(self) -> None:
        """The handshake with the key taken last has succeeded."""
        self._worked = self._tried
        self._refused.clear()

    def on_refused(self) -> bool:
        """It has failed; True where that was the last key there is. The next `take` begins again."""
        self._refused.add(self._tried)
        if self._refused.issuperset(self._ring.pairs()):
            self._refused.clear()
            return True
        return False


def _read(folder: Path) -> dict[str, bytes]:
    """Read the secrets by name. In a mounted Secret all come from one version.

    `current` is a link into the version's own folder, which vanishes when a newer one is there: read last,
    it fails then, instead of an optional key seeming absent.
    """
    version = (folder / NAMES[0]).resolve(strict=True).parent
    found = {name: (version / name).read_bytes() for name in NAMES[1:] if (version / name).exists()}
    found = {NAMES[0]: (version / NAMES[0]).read_bytes(), **found}
    for name, raw in found.items():
        if len(raw) != KEY_BYTES:
            raise ValueError(f"{name} must have {KEY_BYTES} bytes, got {len(raw)}")
    return found


def _pairs_of(raw: dict[str, bytes]) -> tuple[KeyPair, ...]:
    return tuple(dict.fromkeys(KeyPair.from_secret(secret) for secret in raw.values()))
