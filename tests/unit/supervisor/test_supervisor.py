"""When processes are started, restarted and stopped, with children that the test plays."""

import asyncio
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from disagg.config import ServeConfig
from disagg.errors import WorkerLost
from disagg.supervisor.plan import ProcessSpec, plan_processes
from disagg.supervisor.supervisor import Supervisor

pytestmark = pytest.mark.anyio


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


class FakeChild:
    """A process that is ready at once and ends at the first signal."""

    pid = 1
    started_at = 0.0

    def __init__(self, spec: ProcessSpec, *, dies: bool = False) -> None:
        self.spec = spec
        self.signals: list[signal.Signals] = []
        self._dies = dies
        self.ended = asyncio.Event()

    async def wait(self, on_event: Callable[[ProcessSpec, dict[str, Any]], None]) -> int:
        if self._dies:
            return 1
        on_event(self.spec, {"event": "ready", "port": 1})
        await self.ended.wait()
        return 0

    async def kill(self) -> None:
        self.ended.set()

    def signal(self, number: signal.Signals) -> None:
        self.signals.append(number)
        self.ended.set()


class Starter:
    """Starts fake children, one `gate` at a time where it is shut."""

    def __init__(self, *, dies: str = "") -> None:
        self.children: list[FakeChild] = []
        self.gate = asyncio.Event()
        self.gate.set()
        self.waiting = asyncio.Event()
        self._dies = dies

    async def __call__(self, spec: ProcessSpec, config_file: Path) -> Any:
        del config_file
        self.waiting.set()
        await self.gate.wait()
        self.children.append(FakeChild(spec, dies=spec.name == self._dies))
        return self.children[-1]

    def named(self, name: str) -> list[FakeChild]:
        return [child for child in self.children if child.spec.name == name]


def supervise(starter: Starter, folder: Path) -> Supervisor:
    specs = plan_processes(ServeConfig(), folder)
    return Supervisor(specs, folder, drain_s=60.0, on_event=lambda *_: None, start=starter)


async def test_the_router_drains_before_its_workers(tmp_path: Path) -> None:
    """Requests that run need their workers to the end."""
    starter, order = Starter(), []
    supervisor = supervise(starter, tmp_path)
    async with asyncio.timeout(5), asyncio.TaskGroup() as tasks:
        tasks.create_task(supervisor.run())
        await supervisor.wait_ready()
        for child in starter.children:
            child.signal = (  # type: ignore[method-assign]
                lambda number, child=child: (order.append(child.spec.name), FakeChild.signal(child, number))
            )
        supervisor.stop()
    assert order[0] == "router"
    assert set(order) == {"router", "prefill-0", "decode-0"}


async def test_a_process_that_starts_during_the_stop_does_not_delay_it(tmp_path: Path) -> None:
    """It has missed the signal that the others got, and would be waited for until the drain's deadline."""
    starter = Starter()
    supervisor = supervise(starter, tmp_path)
    async with asyncio.timeout(5), asyncio.TaskGroup() as tasks:
        tasks.create_task(supervisor.run())
        await supervisor.wait_ready()
        starter.gate.clear()
        starter.waiting.clear()
        starter.named("decode-0")[0].signal(signal.SIGKILL)
        await starter.waiting.wait()
        supervisor.stop()
        await starter.named("prefill-0")[0].ended.wait()
        starter.gate.set()
    assert signal.SIGKILL in starter.named("decode-0")[1].signals


async def test_a_process_that_cannot_start_ends_the_system(tmp_path: Path) -> None:
    """Restarting it for ever would hide why."""
    supervisor = supervise(Starter(dies="prefill-0"), tmp_path)
    async with asyncio.timeout(5):
        with pytest.raises(WorkerLost, match="prefill-0 ended with status 1"):
            await supervisor.run()
