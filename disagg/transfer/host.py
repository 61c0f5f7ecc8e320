"""Proof that a process is gone, which fences whatever it was writing.

A pid alone proves nothing: it is reused, and another pid namespace numbers other processes. A
`host_id` that is equal on both sides says that pids can be looked up here; the start time tells
a process from its successor under the same pid.
"""

import os
from pathlib import Path

PROC = Path("/proc")


def host_id() -> str:
    """Name this boot of this machine and this pid namespace."""
    boot_id = (PROC / "sys/kernel/random/boot_id").read_text().strip()
    return f"{boot_id}/{os.stat(PROC / 'self/ns/pid').st_ino}"


def process_start_time(pid: int) -> int | None:
    """Read when a process started, in clock ticks since boot; None when it is gone.

    A zombie counts as gone, for its memory, its links and its GPU contexts are; but not one of which
    another thread still lives: what they share is given up by the last of them.
    """
    try:
        stat = (PROC / str(pid) / "stat").read_text()
        num_threads = len(os.listdir(PROC / str(pid) / "task"))
    except (FileNotFoundError, ProcessLookupError):
        return None
    # The command's name comes second, in parentheses, and may itself hold both of them.
    fields = stat.rpartition(")")[2].split()
    state, start_time = fields[0], int(fields[19])
    return None if state in "ZX" and num_threads <= 1 else start_time


def is_process_gone(pid: int, start_time: int) -> bool:
    """Tell whether the process that started then has ended. Only where the host ids are equal."""
    return process_start_time(pid) != start_time
