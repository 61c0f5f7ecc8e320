"""The threads that follow a release, and the one place where they hand over to the loop."""

import asyncio
import logging
import threading
import time
from collections.abc import Callable, Mapping
from typing import Any, Protocol

from disagg.kubernetes.pods import Pod, PodEnd, PodEnds
from disagg.kubernetes.refusals import Refusal, Refusals
from disagg.kubernetes.slices import ROUTER_SERVICE, EndpointSlice, Member, members_of
from disagg.kubernetes.watch import ApiError, Source, Watch
from disagg.telemetry import fields

log = logging.getLogger(__name__)

STOP_S = 2.0
"""A thread in the middle of connecting is not waited for longer; it changes nothing any more."""

OnMembers = Callable[[Mapping[str, Member]], None]
OnEnded = Callable[[frozenset[PodEnd]], None]


class Api(Protocol):
    """What a release has, as the API server tells."""

    @property
    def slices(self) -> Source[EndpointSlice]:
        """Of its Services."""

    @property
    def pods(self) -> Source[Pod]:
        """All of them."""

    def post(self, refusal: Refusal) -> None:
        """Make the event that tells of it, unless another router has; raises `ApiError`."""

    def interrupt(self) -> None:
        """End the watches that wait."""

    def close(self) -> None:
        """Close all connections."""


class Discovery:
    """Tells the loop of members that change and of pods that end, from `start` to `stop`."""

    def __init__(
        self, api: Api, release: str, on_workers: OnMembers, on_routers: OnMembers, on_ended: OnEnded
    ) -> None:
        self._api = api
        self._router_service = f"{release}-{ROUTER_SERVICE}"
        self._on_workers = on_workers
        self._on_routers = on_routers
        self._on_ended = on_ended
        self._stopping = threading.Event()
        self._workers: dict[str, Member] | None = None
        self._routers: dict[str, Member] | None = None
        self._ends = PodEnds()
        self._refusals = Refusals()
        wait, clock = self._stopping.wait, time.monotonic
        # One each: what one of them waits for does not keep the other.
        watches = {
            "slices": Watch(api.slices, self._on_slices, wait=wait, clock=clock).run,
            "pods": Watch(api.pods, self._on_pods, wait=wait, clock=clock).run,
        }
        self._threads = [
            threading.Thread(target=run, name=f"discovery-{kind}", daemon=True)
            for kind, run in watches.items()
        ]

    def start(self) -> None:
        """Begin, on the running loop."""
        self._loop = asyncio.get_running_loop()
        for thread in self._threads:
            thread.start()

    def stop(self) -> None:
        """End the threads. Nothing is told after this returns. Idempotent."""
        self._stopping.set()
        self._api.interrupt()
        until = time.monotonic() + STOP_S
        for thread in self._threads:
            if thread.is_alive():
                thread.join(max(0.0, until - time.monotonic()))
        if not any(thread.is_alive() for thread in self._threads):
            self._api.close()

    def _on_slices(self, slices: list[EndpointSlice], removed: EndpointSlice | None) -> None:
        del removed
        workers = members_of(s for s in slices if s.service != self._router_service)
        routers = members_of(s for s in slices if s.service == self._router_service)
        if workers != self._workers:
            self._workers = workers
            self._hand_over(self._on_workers, workers)
        if routers != self._routers:
            self._routers = routers
            self._hand_over(self._on_routers, routers)

    def _on_pods(self, pods: list[Pod], removed: Pod | None) -> None:
        ends = self._ends.take(pods, removed)
        if ends:
            self._hand_over(self._on_ended, ends)
        for refusal in self._refusals.take(pods):
            try:
                self._api.post(refusal)
            except ApiError as error:
                why = fields(pod=refusal.pod, sentence=refusal.sentence, error=error)
                log.warning("pod is misconfigured, and no event says so %s", why)

    def _hand_over(self, tell: Callable[[Any], None], told: Any) -> None:
        if not self._stopping.is_set():
            self._loop.call_soon_threadsafe(self._deliver, tell, told)

    def _deliver(self, tell: Callable[[Any], None], told: Any) -> None:
        if not self._stopping.is_set():
            tell(told)


def follow_release(
    release: str, namespace: str | None, on_workers: OnMembers, on_routers: OnMembers, on_ended: OnEnded
) -> Discovery:
    """Make the discovery of a release's workers, routers and ended pods; `start` it on the loop.

    Raises:
        ConfigError: No cluster is found from here.
    """
    from disagg.kubernetes.client import KubernetesApi

    return Discovery(KubernetesApi(namespace, release), release, on_workers, on_routers, on_ended)
