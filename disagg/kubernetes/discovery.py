"""The thread that follows a release, and the one place where it hands over to the loop."""

import asyncio
import threading
import time
from collections.abc import Callable, Mapping
from typing import Protocol

from disagg.kubernetes.slices import WORKER_SERVICES, EndpointSlice, Member, members_of
from disagg.kubernetes.watch import Api, SliceWatch

STOP_S = 2.0
"""A thread in the middle of connecting is not waited for longer; it changes nothing any more."""

OnMembers = Callable[[Mapping[str, Member]], None]


class ClosableApi(Api, Protocol):
    """An API whose watch can be ended from outside."""

    def interrupt(self) -> None:
        """End a watch that waits."""

    def close(self) -> None:
        """Close its connections."""


class Discovery:
    """Tells the loop of the members whenever they have changed, from `start` to `stop`."""

    def __init__(self, api: ClosableApi, on_members: OnMembers) -> None:
        self._api = api
        self._on_members = on_members
        self._stopping = threading.Event()
        self._last: dict[str, Member] | None = None
        self._watch = SliceWatch(api, self._on_slices, wait=self._stopping.wait, clock=time.monotonic)
        self._thread = threading.Thread(target=self._watch.run, name="discovery", daemon=True)

    def start(self) -> None:
        """Begin, on the running loop."""
        self._loop = asyncio.get_running_loop()
        self._thread.start()

    def stop(self) -> None:
        """End the thread. Nothing is told after this returns. Idempotent."""
        self._stopping.set()
        self._api.interrupt()
        if self._thread.is_alive():
            self._thread.join(STOP_S)
        if not self._thread.is_alive():
            self._api.close()

    def _on_slices(self, slices: list[EndpointSlice]) -> None:
        members = members_of(slices)
        if members != self._last:
            self._last = members
            if not self._stopping.is_set():
                self._loop.call_soon_threadsafe(self._deliver, members)

    def _deliver(self, members: Mapping[str, Member]) -> None:
        if not self._stopping.is_set():
            self._on_members(members)


def follow_release(release: str, namespace: str | None, on_members: OnMembers) -> Discovery:
    """Make the discovery of a release's workers; `start` it on the loop.

    Raises:
        ConfigError: No cluster is found from here.
    """
    from disagg.kubernetes.client import KubernetesApi

    return Discovery(KubernetesApi(namespace, [f"{release}-{name}" for name in WORKER_SERVICES]), on_members)
