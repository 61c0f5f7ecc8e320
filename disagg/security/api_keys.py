"""The keys that clients of the API may send."""

import hmac
import re
import time
from collections.abc import Callable
from pathlib import Path

from disagg.errors import ConfigError
from disagg.security.reloaded import Reloaded

_KEY = re.compile(rb"[!-~]+")
"""What an `authorization` header can carry: printable ASCII without blanks."""


class ApiKeys:
    """Those given at start, and those of a file, which is read again when it changes.

    A file holds one key a line; blank lines and those that begin with # do not count. It always has one
    that does: emptied by mistake, it opens the door to nobody.
    """

    def __init__(
        self,
        given: tuple[str, ...] = (),
        file: Path | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Read the file, if there is one; raises `ConfigError` where it cannot be used."""
        self._given = tuple(key.encode() for key in given)
        self._file: Reloaded[bytes, tuple[bytes, ...]] | None = None
        if file is not None:
            try:
                self._file = Reloaded(f"api_key_file {str(file)!r}", file.read_bytes, _parse, clock=clock)
            except (OSError, ValueError) as error:
                raise ConfigError(f"api_key_file {str(file)!r} cannot be used: {error}") from error

    @property
    def is_needed(self) -> bool:
        """Whether a client must send one."""
        return bool(self._given) or self._file is not None

    def accept(self, sent: bytes) -> bool:
        """Whether this is one of them."""
        keys = self._given + (self._file.get() if self._file is not None else ())
        # Every key is compared, in constant time: how long this takes tells nothing of them.
        return any([hmac.compare_digest(key, sent) for key in keys])


def _parse(raw: bytes) -> tuple[bytes, ...]:
    lines = [(number, line.strip()) for number, line in enumerate(raw.splitlines(), 1)]
    keys = [(number, line) for number, line in lines if line and not line.startswith(b"#")]
    for number, key in keys:
        if not _KEY.fullmatch(key):
            raise ValueError(f"line {number} is no key: it must be printable ASCII without blanks")
    if not keys:
        raise ValueError("it has no key")
    return tuple(key for _, key in keys)
