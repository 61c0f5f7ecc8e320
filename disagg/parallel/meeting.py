"""Where the ranks of a group leave their addresses for each other, once, before they connect.

Rank 0 keeps it. The others reach it over the links that they have to rank 0 anyway, so nothing listens
for them, and who may not have such a link does not learn where the ranks are.
"""

import threading
from collections.abc import Callable
from datetime import timedelta

from torch._C import _distributed_c10d as c10d

from disagg.errors import WorkerLost

Put = Callable[[str, bytes], None]
Get = Callable[[str], bytes]


class Meeting:
    """Rank 0's table. Any thread."""

    def __init__(self, timeout_s: float = 60.0) -> None:
        self._timeout_s = timeout_s
        self._values: dict[str, bytes] = {}
        self._changed = threading.Condition()
        self._is_closed = False

    def put(self, key: str, value: bytes) -> None:
        """Leave `value` for whoever asks for `key`."""
        with self._changed:
            self._values[key] = value
            self._changed.notify_all()

    def get(self, key: str) -> bytes:
        """Wait for what somebody leaves under `key`.

        Raises:
            WorkerLost: The table was closed, for a rank is gone, or nobody left it in time.
        """
        with self._changed:
            self._changed.wait_for(lambda: key in self._values or self._is_closed, self._timeout_s)
            if key not in self._values:
                why = "a rank is gone" if self._is_closed else f"a rank did not come in {self._timeout_s:g} s"
                raise WorkerLost(why)
            return self._values[key]

    def close(self) -> None:
        """Let nobody wait any longer. Idempotent."""
        with self._changed:
            self._is_closed = True
            self._changed.notify_all()


class MeetingStore(c10d.Store):
    """The table as torch's process groups want it."""

    def __init__(self, put: Put, get: Get) -> None:
        super().__init__()
        self._put = put
        self._get = get

    def set(self, key: str, value: bytes | str) -> None:
        """Leave a value."""
        self._put(key, value.encode() if isinstance(value, str) else value)

    def get(self, key: str) -> bytes:
        """Wait for a value."""
        return self._get(key)

    def wait(self, keys: list[str], timeout: timedelta | None = None) -> None:
        """Wait for values, for as long as the table does."""
        del timeout
        for key in keys:
            self._get(key)
