"""`disagg serve`: a whole system on this machine, seen from the terminal."""

import asyncio
import contextlib
import logging
import os
import shutil
import signal
import tempfile
from collections.abc import AsyncIterator
from functools import partial
from pathlib import Path
from typing import Any

import httpx
from rich.console import Console
from rich.logging import RichHandler
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn
from rich.table import Table
from rich.text import Text

from disagg.checkpoint import resolve
from disagg.config import ServeConfig
from disagg.errors import WorkerLost
from disagg.security import host_port, is_wildcard
from disagg.supervisor.child import Child, Event
from disagg.supervisor.plan import ProcessSpec, plan_processes
from disagg.supervisor.supervisor import Supervisor

_POLL_S = 0.05
_LAST_WORDS_S = 1.0


def run_serve(config: ServeConfig) -> int:
    """Serve until a signal; return the exit status.

    Raises:
        ConfigError: the configuration cannot work.
    """
    console = Console(stderr=True)
    logging.basicConfig(
        level=logging.INFO, format="%(message)s", handlers=[RichHandler(console=console, show_path=False)]
    )
    logging.getLogger("httpx").setLevel(logging.WARNING)
    runtime_dir = Path(tempfile.mkdtemp(prefix="disagg-"))  # 0700: control sockets and keys live here
    try:
        specs = plan_processes(config, runtime_dir)
        with console.status(f"Looking for {config.model.model}"):
            # Before the workers, so that a GGUF is converted once, not once a worker.
            resolve(config.model.model, config_only=config.model.load_format == "dummy")
        return asyncio.run(_serve(config, specs, runtime_dir, console))
    finally:
        shutil.rmtree(runtime_dir, ignore_errors=True)


async def _serve(config: ServeConfig, specs: list[ProcessSpec], runtime_dir: Path, console: Console) -> int:
    async with logs_above_bars(console) as stderr, asyncio.TaskGroup() as tasks:
        progress = _LoadProgress(console)
        supervisor = Supervisor(
            specs,
            runtime_dir,
            drain_s=config.lease.drain_seconds,
            on_event=progress.on_event,
            start=partial(Child.start, stderr=stderr),
        )
        stops = _Stops(supervisor, console)
        loop = asyncio.get_running_loop()
        for number in (signal.SIGINT, signal.SIGTERM):
            loop.add_signal_handler(number, stops.on_signal)
        announcing = tasks.create_task(_announce(config, supervisor, progress, console, len(specs) - 1))
        try:
            await supervisor.run()
        except WorkerLost as error:
            progress.close()
            console.print(f"disagg: {error}", style="red", highlight=False)
            return 1
        finally:
            announcing.cancel()
            progress.close()
    return 130 if stops.count > 1 else 0


@contextlib.asynccontextmanager
async def logs_above_bars(console: Console) -> AsyncIterator[int | None]:
    """Give children a stderr whose lines no redrawn bar wipes out. None where it is no terminal: use ours."""
    if not console.is_terminal:
        yield None
        return
    read_fd, write_fd = os.pipe()
    reader = asyncio.StreamReader(limit=1 << 20)
    transport, _ = await asyncio.get_running_loop().connect_read_pipe(
        lambda: asyncio.StreamReaderProtocol(reader), os.fdopen(read_fd, "rb", buffering=0)
    )

    async def show() -> None:
        async for line in reader:
            console.print(Text(line.decode(errors="replace").rstrip("\n")), soft_wrap=True)

    showing = asyncio.create_task(show())
    try:
        yield write_fd
    finally:
        os.close(write_fd)  # the children have ended, so what they said comes to an end, but for stray ranks
        await asyncio.wait([showing], timeout=_LAST_WORDS_S)
        showing.cancel()
        transport.close()


class _Stops:
    """The first signal drains, the second stops at once."""

    def __init__(self, supervisor: Supervisor, console: Console) -> None:
        self.count = 0
        self._supervisor = supervisor
        self._console = console

    def on_signal(self) -> None:
        self.count += 1
        if self.count == 1:
            self._console.print("Running requests end first; Ctrl-C again stops at once.")
            self._supervisor.stop()
        else:
            self._supervisor.kill()


class _LoadProgress:
    """A bar for each process that loads weights."""

    def __init__(self, console: Console) -> None:
        self._progress = Progress(
            TextColumn("{task.description:<12}"),
            BarColumn(),
            TextColumn("{task.percentage:>3.0f}% {task.fields[what]}"),
            TimeElapsedColumn(),
            console=console,
            transient=True,
        )
        self._bars: dict[str, TaskID] = {}
        self._progress.start()

    def on_event(self, spec: ProcessSpec, event: Event) -> None:
        """Advance the bar of the process that reported."""
        if spec.name not in self._bars:
            self._bars[spec.name] = self._progress.add_task(spec.name, total=1.0, what="starting")
        bar = self._bars[spec.name]
        match event.get("event"):
            case "progress":
                self._progress.update(
                    bar, completed=event["done"] / max(1, event["total"]), what="loading weights"
                )
            case "ready":
                self._progress.update(bar, completed=1.0, what="ready")

    def close(self) -> None:
        """Take the bars away."""
        self._progress.stop()


async def _announce(
    config: ServeConfig, supervisor: Supervisor, progress: _LoadProgress, console: Console, num_workers: int
) -> None:
    """Print the table of workers and the Ready line, once the router can use every worker."""
    await supervisor.wait_ready()
    base = f"http://{host_port(_name_of(config.host), supervisor.ready['router']['port'])}"
    workers = await _wait_for_workers(base, config.api_key, num_workers)
    progress.close()
    console.print(_worker_table(workers))
    name = config.model.served_model_name or config.model.model
    # Flushed: a script reads this line through a pipe to know that it may begin.
    print(f"Ready: {base}/v1", flush=True)
    console.print(_snippets(base, name, config.api_key), highlight=False, markup=False, soft_wrap=True)


async def _wait_for_workers(base: str, api_keys: tuple[str, ...], num_workers: int) -> list[dict[str, Any]]:
    headers = {"authorization": f"Bearer {api_keys[0]}"} if api_keys else {}
    async with httpx.AsyncClient(base_url=base, headers=headers, trust_env=False) as client:
        while True:
            # A router that has just died is started again, and one that drains ends this task.
            with contextlib.suppress(httpx.TransportError):
                workers: list[dict[str, Any]] = (await client.get("/disagg/workers")).json()
                if sum(worker["state"] == "ready" for worker in workers) == num_workers:
                    return workers
            await asyncio.sleep(_POLL_S)


def _name_of(host: str) -> str:
    """Return what this machine can open, where every interface is bound."""
    return "127.0.0.1" if is_wildcard(host) else host


def _worker_table(workers: list[dict[str, Any]]) -> Table:
    table = Table(title=None, box=None, padding=(0, 2, 0, 0))
    for column in ("worker", "role", "state", "tp", "pid", "pages", "metrics"):
        table.add_column(column, justify="right" if column in ("tp", "pid", "pages") else "left")
    for worker in sorted(workers, key=lambda worker: str(worker["id"])):
        table.add_row(
            worker["id"],
            worker["role"],
            worker["state"],
            str(worker["tensor_parallel_size"]),
            str(worker["pid"]),
            str(worker["pages"]["total"]),
            worker["metrics_url"],
        )
    return table


def _snippets(base: str, model: str, api_keys: tuple[str, ...]) -> str:
    """Return what a newcomer pastes; the key itself is never printed."""
    bearer = " -H 'authorization: Bearer YOUR_KEY'" if api_keys else ""
    key = "YOUR_KEY" if api_keys else "none"
    return f"""
curl {base}/v1/chat/completions{bearer} -H 'content-type: application/json' -d '{{
  "model": "{model}", "messages": [{{"role": "user", "content": "Hello!"}}]}}'

from openai import OpenAI  # pip install openai
client = OpenAI(base_url="{base}/v1", api_key="{key}")
for chunk in client.chat.completions.create(model="{model}", stream=True,
        messages=[{{"role": "user", "content": "Hello!"}}]):
    print(chunk.choices[0].delta.content or "", end="", flush=True)

What the router saw: {base}/disagg/requests  ·  workers: {base}/disagg/workers  ·  Ctrl-C drains
"""
