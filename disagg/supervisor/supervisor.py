"""Keeps one system's processes running until told to stop, then stops them in order."""

import asyncio
import json
import logging
import signal
import time
from collections.abc import Awaitable, Callable
from pathlib import Path

from disagg.config import flatten
from disagg.errors import WorkerLost, ungrouped
from disagg.supervisor.child import Child, Event
from disagg.supervisor.plan import ProcessSpec

log = logging.getLogger(__name__)

_STEADY_S = 10.0
"""A process that lived this long is restarted at once; one that dies sooner waits longer each time."""
_MAX_BACKOFF_S = 10.0


def backoff_s(quick_deaths: int) -> float:
    """Return how long to wait before the next start, after this many quick deaths in a row."""
    return 0.0 if quick_deaths == 0 else min(_MAX_BACKOFF_S, 0.25 * 2 ** min(quick_deaths - 1, 10))


class Supervisor:
    """Starts every process of a plan and restarts what dies, once the whole system has been up.

    Until every process has been ready once, a death is a failed start: everything is stopped.
    `on_event` sees each child's progress and readiness.
    """

    def __init__(
        self,
        specs: list[ProcessSpec],
        runtime_dir: Path,
        *,
        drain_s: float,
        on_event: Callable[[ProcessSpec, Event], None],
        start: Callable[[ProcessSpec, Path], Awaitable[Child]] = Child.start,
    ) -> None:
        self._specs = specs
        self._runtime_dir = runtime_dir
        self._drain_s = drain_s
        self._on_event = on_event
        self._start = start
        self._children: dict[str, Child] = {}
        self._ready: dict[str, Event] = {}
        self._stopping = asyncio.Event()
        self._all_ready = asyncio.Event()

    @property
    def ready(self) -> dict[str, Event]:
        """The newest ready event of each process."""
        return self._ready

    async def wait_ready(self) -> None:
        """Wait until every process has been ready once."""
        await self._all_ready.wait()

    async def run(self) -> None:
        """Keep the system running until `stop`; nothing it started outlives this call.

        Raises:
            WorkerLost: a process ended before it was ready for the first time.
        """
        keepers: list[asyncio.Task[None]] = []
        try:
            with ungrouped(WorkerLost):
                async with asyncio.TaskGroup() as tasks:
                    keepers += [tasks.create_task(self._keep(spec), name=spec.name) for spec in self._specs]
                    tasks.create_task(self._stop_in_order(keepers), name="stop")
        finally:
            for child in self._children.values():
                await child.kill()

    def stop(self) -> None:
        """Drain: the router first, so that running requests end, then the workers."""
        self._stopping.set()

    def kill(self) -> None:
        """Stop at once."""
        self._stopping.set()
        for child in self._children.values():
            child.signal(signal.SIGKILL)

    async def _keep(self, spec: ProcessSpec) -> None:
        quick_deaths = 0
        while not self._stopping.is_set():
            child = await self._start(spec, self._write_config(spec))
            self._children[spec.name] = child
            if self._stopping.is_set():
                child.signal(signal.SIGKILL)  # it came after the others were told, and nothing runs on it
            status = await child.wait(self._note)
            if self._stopping.is_set():
                return
            if not self._all_ready.is_set():
                raise WorkerLost(f"{spec.name} ended with status {status} before it was ready")
            quick_deaths = quick_deaths + 1 if time.monotonic() - child.started_at < _STEADY_S else 0
            delay_s = backoff_s(quick_deaths)
            log.warning("%s (pid %d) ended with status %d; restarting", spec.name, child.pid, status)
            await self._pause(delay_s)

    async def _pause(self, delay_s: float) -> None:
        try:
            async with asyncio.timeout(delay_s):
                await self._stopping.wait()
        except TimeoutError:
            pass

    def _note(self, spec: ProcessSpec, event: Event) -> None:
        if event.get("event") == "ready":
            self._ready[spec.name] = event
            if len(self._ready) == len(self._specs):
                self._all_ready.set()
        self._on_event(spec, event)

    async def _stop_in_order(self, keepers: list[asyncio.Task[None]]) -> None:
        await self._stopping.wait()
        routers = [task for task in keepers if task.get_name() == "router"]
        await self._terminate(routers)
        await self._terminate(keepers)

    async def _terminate(self, keepers: list[asyncio.Task[None]]) -> None:
        for task in keepers:
            if child := self._children.get(task.get_name()):
                child.signal(signal.SIGTERM)
        # A child ends by itself when its own deadline passes; a little longer, and it is stuck.
        _, stuck = await asyncio.wait(keepers, timeout=self._drain_s + 5.0)
        for task in stuck:
            log.error("%s did not stop within %.0f s; killed", task.get_name(), self._drain_s + 5.0)
            self._children[task.get_name()].signal(signal.SIGKILL)

    def _write_config(self, spec: ProcessSpec) -> Path:
        path = self._runtime_dir / f"{spec.name}.json"
        content = flatten(spec.config)
        if spec.command == "router" and (ready := self._ready.get("router")):
            content["port"] = ready["port"]  # clients know the first one's address
        path.touch(mode=0o600)
        path.write_text(json.dumps(content))
        return path
