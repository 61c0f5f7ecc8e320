"""Keeps the objects of one kind: lists them, follows the changes, lists again when told to.

An API server that is away changes nothing: what was known stays true until a whole list or an event
says otherwise. Runs in a thread of its own; clock and waiting are injected.
"""

import logging
import random
from collections.abc import Callable, Iterator
from typing import Generic, Protocol, TypeVar

from msgspec import Struct

from disagg.errors import DisaggError
from disagg.telemetry import fields

log = logging.getLogger(__name__)

BACKOFF_MIN_S = 0.5
BACKOFF_MAX_S = 15.0
SHORT_WATCH_S = 1.0
"""A watch that ends sooner without having told anything is as good as a failed one."""


class ApiError(DisaggError):
    """The API server did not answer as it should; nothing can be concluded from that."""


class Owner(Struct, frozen=True):
    """Who made an object."""

    kind: str = ""


class Metadata(Struct, frozen=True, rename="camel"):
    """Of any object."""

    name: str = ""
    uid: str = ""
    resource_version: str = ""
    labels: dict[str, str] | None = None
    owner_references: list[Owner] | None = None


class KubeObject(Protocol):
    """What is kept of an object must have these."""

    @property
    def metadata(self) -> Metadata:
        """Its name and version."""


T = TypeVar("T", bound=KubeObject)


class Listed(Struct, Generic[T], frozen=True):
    """All objects as of `metadata.resource_version`."""

    kind: str
    metadata: Metadata
    items: list[T] | None


class Changed(Struct, Generic[T], frozen=True):
    """An object is new or another."""

    object: T


class Removed(Struct, Generic[T], frozen=True):
    """An object is gone; this is its last state."""

    object: T


class Bookmark(Struct, frozen=True):
    """Nothing has changed up to this version."""

    resource_version: str


class Expired(Struct, frozen=True):
    """The version is too old to follow on from: list again."""


Event = Changed[T] | Removed[T] | Bookmark | Expired


class Source(Protocol[T]):
    """What is asked of the API server. Both raise `ApiError`."""

    def list(self) -> Listed[T]:
        """Return every object there is."""

    def watch(self, version: str) -> Iterator[Event[T]]:
        """Yield what has changed since `version`; ends when the server ends it, within a minute."""


class Watch(Generic[T]):
    """Follows objects and tells of them after each change.

    Args:
        source: Where they are.
        tell: Given all objects after each list and each change; and where the change is that one is
            gone, that one's last state.
        wait: Waits so many seconds; True when it is time to stop.
        clock: Seconds.
        jitter: From 0 to 1; routers that lost the API server together do not come back together.
    """

    def __init__(
        self,
        source: Source[T],
        tell: Callable[[list[T], T | None], None],
        *,
        wait: Callable[[float], bool],
        clock: Callable[[], float],
        jitter: Callable[[], float] = random.random,
    ) -> None:
        self._source = source
        self._tell = tell
        self._wait = wait
        self._clock = clock
        self._jitter = jitter
        self._objects: dict[str, T] = {}
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
                    log.warning("API server lost, what it told stays %s", fields(error=error))
                is_fine = False
            self._failures = 0 if is_fine else self._failures + 1

    def _turn(self) -> bool:
        """List if needed, then one watch to its end; whether the next may follow at once."""
        if self._version is None:
            self._list()
            assert self._version is not None
        began_at, is_fine = self._clock(), False
        for event in self._source.watch(self._version):
            if isinstance(event, Expired):
                log.info("objects are listed again %s", fields(version=self._version))
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
        listed = self._source.list()
        self._objects = {item.metadata.name: item for item in listed.items or []}
        self._version = listed.metadata.resource_version
        self._tell(list(self._objects.values()), None)

    def _on_event(self, event: Changed[T] | Removed[T] | Bookmark) -> None:
        if isinstance(event, Bookmark):
            self._version = event.resource_version
            return
        metadata, removed = event.object.metadata, None
        self._version = metadata.resource_version
        if isinstance(event, Changed):
            self._objects[metadata.name] = event.object
        else:
            self._objects.pop(metadata.name, None)
            removed = event.object
        self._tell(list(self._objects.values()), removed)


def backoff_s(failures: int, jitter: float) -> float:
    """Seconds before the next try: none before the first, then longer and longer, never very long."""
    if not failures:
        return 0.0
    longest = min(BACKOFF_MIN_S * 2.0 ** min(failures - 1, 16), BACKOFF_MAX_S)
    return longest * (0.5 + jitter / 2)
