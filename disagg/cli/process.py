"""What a command needs when another process of ours started it."""

import json
import os
from collections.abc import Callable
from typing import Any, TypeVar

import click

from disagg.supervisor import die_with_parent

F = TypeVar("F", bound=Callable[..., Any])


def child_options(command: F) -> F:
    """Add the hidden options by which a supervisor follows its child."""
    command = click.option("--ready-fd", type=int, hidden=True)(command)
    return click.option("--parent-pid", type=int, hidden=True)(command)


def reporter(ready_fd: int | None, parent_pid: int | None) -> Callable[[dict[str, Any]], None]:
    """Return what tells the supervisor of progress and readiness: one JSON object a line.

    With `parent_pid` this process is tied to that one: it is killed when the parent ends.
    """
    if parent_pid is not None:
        die_with_parent(parent_pid)

    def report(event: dict[str, Any]) -> None:
        if ready_fd is not None:
            os.write(ready_fd, json.dumps(event).encode() + b"\n")

    return report
