"""The key ring: CURVE secret keys in a folder, read again when they may have changed.

The folder holds `current`, and during a rotation `next` or `previous`: each 32 random bytes, a secret key
whose public half is derived. One key pair serves every part of a release. A server proves itself with
what `current` was when it started, lets in whoever has any key that is there now, and a client tries all
that are there now. So a rotation needs no downtime: add `next` everywhere; then make it `current`, keep the
old one as `previous` and restart the processes; then drop `previous`.
"""

import logging
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import zmq
from zmq.utils import z85

from disagg.errors import ConfigError
from disagg.telemetry import fields

log = logging.getLogger(__name__)

NAMES = ("current", "next", "previous")
"""In the order in which a client tries them."""
KEY_BYTES = 32
REREAD_AFTER_S = 1.0
"""Bounds what a flood of strangers can make us read; a change shows within it."""


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
    """The keys of one folder. May be used from any thread.

    It is read when asked, at most once a second: no timer, no descriptor kept. A folder that becomes
    unusable changes nothing until it is mended; the log says so once.
    """

    def __init__(self, folder: Path, clock: Callable[[], float] = time.monotonic) -> None:
        """Read the folder; raises `ConfigError` where it has no usable keys."""
        self._folder = folder
        self._clock = clock
        self._lock = threading.Lock()
        try:
            self._raw = _read(folder)
        except (OSError, ValueError) as error:
            raise ConfigError(f"transport_keys {str(folder)!r} cannot be used: {error}") from error
        self._pairs = _pairs_of(self._raw)
        self._read_at = clock()
        self._failure = ""
        self.own = self._pairs[0]
        """What a server of this process proves itself with, for as long as the process lives."""

    def pairs(self) -> tuple[KeyPair, ...]:
        """The keys there are now: current, next, previous; each once."""
        with self._lock:
            now = self._clock()
            if now - self._read_at >= REREAD_AFTER_S:
                self._read_at = now
                self._reread()
            return self._pairs

    def accepts(self, public: bytes) -> bool:
        """Whether a client that proved to have this key (Z85) is one of ours."""
        return any(pair.public == public for pair in self.pairs())

    def _reread(self) -> None:
        failure = ""
        try:
            raw = _read(self._folder)
        except (OSError, ValueError) as error:
            failure = str(error)
        else:
            if raw != self._raw:
                self._raw, self._pairs = raw, _pairs_of(raw)
                log.info("transport keys changed %s", fields(folder=self._folder, keys=", ".join(raw)))
                if self.own not in self._pairs:
                    log.error(
                        "the key this process started with is no longer in the folder: nobody can connect to "
                        "it, restart it %s",
                        fields(folder=self._folder),
                    )
        if failure != self._failure:
            self._failure = failure
            if failure:
                log.error("transport keys unreadable, the old ones stay %s", fields(error=failure))


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
