"""`disagg worker`."""

from typing import Any

import click

from disagg.cli.options import build, config_options
from disagg.cli.process import child_options, reporter
from disagg.config import WorkerConfig


@click.command()
@config_options(WorkerConfig)
@child_options
def worker(ready_fd: int | None, parent_pid: int | None, **values: Any) -> None:
    """Run one worker: an engine that prefills, decodes, or does both."""
    from disagg.worker import run_worker

    report = reporter(ready_fd, parent_pid)
    raise SystemExit(run_worker(build(WorkerConfig, values), ready=report))
