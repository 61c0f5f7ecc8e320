"""The supervisor with real children."""

import asyncio
from pathlib import Path

import msgspec
import pytest

from disagg.config import ServeConfig
from disagg.errors import WorkerLost
from disagg.supervisor.plan import plan_processes
from disagg.supervisor.supervisor import Supervisor


def children() -> set[int]:
    """The processes that this one has started and not yet reaped."""
    lists = [path.read_text().split() for path in Path("/proc/self/task").glob("*/children")]
    return {int(pid) for pids in lists for pid in pids}


@pytest.mark.anyio
async def test_a_failed_start_outlives_none_of_its_children(tmp_path: Path) -> None:
    """The others are killed, and `run` returns only when they are gone."""
    before = children()
    config = msgspec.convert({"model": {"model": str(tmp_path / "absent")}, "port": 0}, ServeConfig)
    supervisor = Supervisor(
        plan_processes(config, tmp_path), tmp_path, drain_s=1.0, on_event=lambda spec, event: None
    )
    async with asyncio.timeout(60):
        with pytest.raises(WorkerLost, match="before it was ready"):
            await supervisor.run()
    assert children() <= before
