"""What `disagg serve` shows."""

import asyncio
import io
import os
import sys

import pytest
from rich.console import Console
from rich.progress import Progress

from disagg.supervisor.serve import logs_above_bars

pytestmark = pytest.mark.anyio


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


async def test_lines_of_children_stand_above_the_bars() -> None:
    """Written past the console, they would be wiped out when the bar is drawn again."""
    screen = io.StringIO()
    console = Console(file=screen, force_terminal=True, width=40)
    said = "12:00:00.000 INFO  worker   ready [bold]" + "x" * 40
    with Progress(console=console, auto_refresh=False) as bars:
        bars.add_task("decode-0", total=1)
        bars.refresh()
        async with logs_above_bars(console) as stderr:
            program = f"import sys; print({said!r}, file=sys.stderr)"
            child = await asyncio.create_subprocess_exec(sys.executable, "-c", program, stderr=stderr)
            assert await child.wait() == 0
        erase_line = "\x1b[2K"
        _, _, after = screen.getvalue().rpartition(erase_line)
        assert said + "\n" in after, "whole, unwrapped, where the bar was"
        assert "decode-0" in after, "and the bar again below it"


async def test_a_log_file_gets_the_lines_of_the_children_themselves() -> None:
    async with logs_above_bars(Console(file=io.StringIO())) as stderr:
        assert stderr is None


async def test_a_process_that_still_holds_the_pipe_delays_no_end() -> None:
    async with asyncio.timeout(5):
        async with logs_above_bars(Console(file=io.StringIO(), force_terminal=True)) as stderr:
            assert stderr is not None
            held = os.dup(stderr)
    os.close(held)
