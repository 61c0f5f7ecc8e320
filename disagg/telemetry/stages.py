"""Where the time of a start goes."""

import time
from collections.abc import Callable

import psutil


class Stages:
    """The stages of a start, one after another, beginning when the process did. One thread at a time."""

    def __init__(
        self, clock: Callable[[], float] = time.monotonic, age_s: Callable[[], float] | None = None
    ) -> None:
        self._clock = clock
        self._seconds: dict[str, float] = {}
        self._began_at = self._ended_at = clock() - (age_s or _process_age_s)()

    def end(self, name: str) -> None:
        """What has passed since the last stage was this one."""
        now = self._clock()
        self._seconds[name] = now - self._ended_at
        self._ended_at = now

    def fields(self) -> dict[str, float]:
        """Each stage and the whole, seconds, for a line of the log."""
        parts = {f"{name}_s": round(seconds, 2) for name, seconds in self._seconds.items()}
        return {"start_s": round(self._ended_at - self._began_at, 2), **parts}


def _process_age_s() -> float:
    return time.time() - psutil.Process().create_time()
