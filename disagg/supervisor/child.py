"""One child process: started with its own configuration file, followed through a pipe."""

import asyncio
import json
import os
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from disagg.supervisor.plan import ProcessSpec

Event = dict[str, Any]


class Child:
    """A running process. Holds the process and its event pipe; `wait` must be awaited to the end."""

    def __init__(self, spec: ProcessSpec, process: asyncio.subprocess.Process, events_fd: int) -> None:
        self.spec = spec
        self.started_at = time.monotonic()
        self._process = process
        self._events_fd = events_fd

    @classmethod
    async def start(cls, spec: ProcessSpec, config_file: Path, *, stderr: int | None = None) -> "Child":
        """Start `disagg COMMAND --config FILE` in a session of its own, its log on `stderr` (default: ours).

        The terminal's Ctrl-C reaches the supervisor alone, which stops its children in order.
        """
        events_fd, child_fd = os.pipe()
        arguments = [spec.command, "--config", str(config_file)]
        arguments += ["--ready-fd", str(child_fd), "--parent-pid", str(os.getpid())]
        # Variables of ours are already in the file; an exported DISAGG_PORT must not reach a worker.
        environment = {name: value for name, value in os.environ.items() if not name.startswith("DISAGG_")}
        try:
            process = await asyncio.create_subprocess_exec(
                sys.executable,
                "-m",
                "disagg",
                *arguments,
                pass_fds=[child_fd],
                env=environment,
                stdin=asyncio.subprocess.DEVNULL,
                stderr=stderr,
                start_new_session=True,
            )
        finally:
            os.close(child_fd)
        return cls(spec, process, events_fd)

    @property
    def pid(self) -> int:
        """Process id."""
        return self._process.pid

    async def wait(self, on_event: Callable[[ProcessSpec, Event], None]) -> int:
        """Pass on every event until the process has ended; return its status."""
        reader = asyncio.StreamReader()
        pipe = os.fdopen(self._events_fd, "rb", buffering=0)
        transport, _ = await asyncio.get_running_loop().connect_read_pipe(
            lambda: asyncio.StreamReaderProtocol(reader), pipe
        )
        try:
            # Ranks inherit no pipe end, so this ends with the child itself.
            async for line in reader:
                on_event(self.spec, json.loads(line))
            return await self._process.wait()
        finally:
            transport.close()

    async def kill(self) -> None:
        """End the process now, and wait until it has ended."""
        self.signal(signal.SIGKILL)
        await self._process.wait()

    def signal(self, number: signal.Signals) -> None:
        """Send a signal, unless the process has already ended."""
        if self._process.returncode is None:
            self._process.send_signal(number)
