"""What was made of files, made again when they have changed.

It is looked at when asked, at most once a second: no timer, no thread and no descriptor, so that a mounted
Secret may be swapped under it.
"""

import logging
import threading
import time
from collections.abc import Callable
from typing import Generic, TypeVar

from disagg.telemetry import fields

log = logging.getLogger(__name__)

REREAD_AFTER_S = 1.0
"""Bounds what a flood of strangers can make us read; a change shows within it."""

Raw = TypeVar("Raw")
T = TypeVar("T")


class Reloaded(Generic[Raw, T]):
    """The newest good value. May be used from any thread.

    Files that cannot be used any more change nothing until they are mended; the log says so once.
    """

    def __init__(
        self,
        what: str,
        read: Callable[[], Raw],
        make: Callable[[Raw], T],
        *,
        on_change: Callable[[T], None] = lambda _: None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Read and make for the first time.

        Args:
            what: What the log calls it.
            read: Reads the files; equal results mean that nothing has changed.
            make: Makes the value of what was read.
            on_change: Told of a new value before anybody gets it.
            clock: Seconds.

        Raises:
            OSError, ValueError: `read` or `make` did, here at the start.
        """
        self._what = what
        self._read = read
        self._make = make
        self._on_change = on_change
        self._clock = clock
        self._lock = threading.Lock()
        self._raw = read()
        self._value = make(self._raw)
        self._looked_at = clock()
        self._failure = ""

    def get(self) -> T:
        """Return the value as of a second ago at most."""
        with self._lock:
            now = self._clock()
            if now - self._looked_at >= REREAD_AFTER_S:
                self._looked_at = now
                self._look()
            return self._value

    def _look(self) -> None:
        failure = ""
        try:
            raw = self._read()
            if raw != self._raw:
                self._value = self._make(raw)
                self._raw = raw
                log.info("%s changed", self._what)
                self._on_change(self._value)
        except (OSError, ValueError) as error:
            failure = str(error)
        if failure and failure != self._failure:
            log.error("%s cannot be used, what there was stays %s", self._what, fields(error=failure))
        self._failure = failure
