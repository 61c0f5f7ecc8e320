"""`disagg router`."""

from typing import Any

import click

from disagg.cli.options import build, config_options
from disagg.cli.process import child_options, reporter
from disagg.config import RouterConfig


@click.command()
@config_options(RouterConfig)
@child_options
def router(ready_fd: int | None, parent_pid: int | None, **values: Any) -> None:
    """Run one router: the OpenAI API, the prefix index, the queue and the ledger."""
    from disagg.router.app import run_router

    report = reporter(ready_fd, parent_pid)
    raise SystemExit(run_router(build(RouterConfig, values), ready=report))
