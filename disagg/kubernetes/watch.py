"""Keeps the EndpointSlices of a release: lists them, follows the changes, lists again when told to.

An API server that is away changes nothing: what was known stays true until a whole list or an event
says otherwise. Runs in a thread of its own; clock and waiting are injected.
"""

import logging
import random
from collections.abc import Callable, Iterator
from typing import Literal, Protocol

from msgspec import Struct

from disagg.errors import DisaggError
from disagg.kubernetes.slices import EndpointSlice, Metadata
from disagg.telemetry import fields

log = logging.getLogger(__name__)

BACKOFF_MIN_S = 0.5
BACKOFF_MAX_S = 15.0
SHORT_WATCH_S = 1.0
"""A watch that ends sooner without having told anything is as good as a failed one."""


class ApiError(DisaggError):
    """The API server did not answer as it should; nothing can be concluded from that."""


class SliceList(Struct, frozen=True):
    """All slices as of `metadata.resource_version`."""

    kind: Literal["EndpointSliceList"]
    metadata: Metadata
    items: list[EndpointSlice] | None


class Changed(Struct, frozen=True):
    """A slice is new or another."""

    slice: EndpointSlice


class Removed(Struct, frozen=True):
    """A slice is gone."""

    slice: EndpointSlice


class Bookmark(Struct, frozen=True):
    """Nothing has changed up to this version."""

    resource_version: str


class Expired(Struct, frozen=True):
    """The version is too old to follow on from: list again."""


Event = Changed | Removed | Bookmark | Expired


class Api(Protocol):
    """What is asked of the API server. Both raise `ApiError`."""

    def list_slices(self) -> SliceList:
        """Return every slice there is."""

    def watch_slices(self, version: str) -> Iterator[Event]:
        """Yield what has changed since `version`; ends when the server ends it, within a minute."""


class SliceWatch:
    """Follows the slices and tells of them after each change.

    Args:
        api: Where they are.
        tell: Given all slices after each list and each change.
        wait: Waits so many seconds; True when it is time to stop.
        clock: Seconds.
        jitter: From 0 to 1; routers that lost the API server together do not come back together.
    """

    def __init__(
        self,
        api: Api,
        tell: Callable[[list[EndpointSlice]], None],
        *,
        wait: Callable[[float], bool],
        clock: Callable[[], float],
        jitter: Callable[[], float] = random.random,
    ) -> None:
        self._api = api
        self._tell = tell
        self._wait = wait
        self._clock = clock
        self._jitter = jitter
        self._slices: dict[str, EndpointSlice] = {}
        self._version: str | None = None
        """To follow on from; None where a list is needed."""
        self._failures = 0

    def run(self) -> None:
        """Follow until `wait` says stop."""
        while not self._wait(backoff_s(self._failures, self._jitter())):
            try:
                is_fine = self._turn()
            except ApiError as error:
                if not self._failures:
                    log.warning("API server lost, members stay as they are %s", fields(error=error))
                is_fine = False
            self._failures = 0 if is_fine else self._failures + 1

    def _turn(self) -> bool:
        """List if needed, then one watch to its end; whether the next may follow at once."""
        if self._version is None:
            self._list()
            assert self._version is not None
        began_at, is_fine = self._clock(), False
        for event in self._api.watch_slices(self._version):
            if isinstance(event, Expired):
                log.info("slices are listed again %s", fields(version=self._version))
                self._version = None
                # At once, but not for ever: a server may find each of its versions too old.
                return is_fine
            self._on_event(event)
            is_fine = True
            self._on_answer()
        is_fine = is_fine or self._clock() - began_at >= SHORT_WATCH_S
        if is_fine:
            self._on_answer()
        return is_fine

    def _on_answer(self) -> None:
        if self._failures:
            log.info("API server is back %s", fields(failures=self._failures))
            self._failures = 0

    def _list(self) -> None:
        listed = self._api.list_slices()
        self._slices = {part.metadata.name: part for part in listed.items or []}
        self._version = listed.metadata.resource_version
        self._tell(list(self._slices.values()))

    def _on_event(self, event: Changed | Removed | Bookmark) -> None:
        if isinstance(event, Bookmark):
            self._version = event.resource_version
            return
        metadata = event.slice.metadata
        self._version = metadata.resource_version
        if isinstance(event, Changed):
            self._slices[metadata.name] = event.slice
        else:
            self._slices.pop(metadata.name, None)
        self._tell(list(self._slices.values()))


def backoff_s(failures: int, jitter: float) -> float:
    """Seconds before the next try: none before the first, then longer and longer, never very long."""
    if not failures:
        return 0.0
    longest = min(BACKOFF_MIN_S * 2.0 ** min(failures - 1, 16), BACKOFF_MAX_S)
    return longest * (0.5 + jitter / 2)
