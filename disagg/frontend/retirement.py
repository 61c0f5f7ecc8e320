"""A server that is to go: its clients are led elsewhere before it stops, and none is refused meanwhile."""

import asyncio

RETIRE_S = 5.0
"""Load balancers and kube-proxy hear within it that this server ends."""


class Retirement:
    """Begun once, never undone. Owned by the loop."""

    def __init__(self, seconds: float = RETIRE_S) -> None:
        self._seconds = seconds
        self._ends_at: float | None = None

    @property
    def has_begun(self) -> bool:
        """Whether every answer is to be the last of its connection, and /health to fail."""
        return self._ends_at is not None

    async def run(self) -> None:
        """Begin, if nobody has, and wait until clients have had the time to go."""
        now = asyncio.get_running_loop().time()
        if self._ends_at is None:
            self._ends_at = now + self._seconds
        await asyncio.sleep(self._ends_at - now)
