"""Prefill workers that have been told where this worker's pool is, and whether they still live."""

from collections.abc import Callable

from disagg.protocol import PeerHello

IsGone = Callable[[int, int], bool]
"""`(pid, start time)`: that process has ended."""


class Sources:
    """Their hellos. A process is proven gone by its pids, or by its successor's hello."""

    def __init__(self, host_id: str, is_gone: IsGone) -> None:
        self._host_id = host_id
        self._is_gone = is_gone
        self._hellos: dict[str, PeerHello] = {}

    @property
    def uuids(self) -> list[str]:
        """Processes not known to be gone."""
        return list(self._hellos)

    def add(self, hello: PeerHello) -> list[str]:
        """Take a hello in; returns the uuids of processes that this one has replaced."""
        replaced = [
            uuid
            for uuid, other in self._hellos.items()
            if other.worker_id == hello.worker_id and uuid != hello.uuid
        ]
        for uuid in replaced:
            del self._hellos[uuid]
        self._hellos[hello.uuid] = hello
        return replaced

    def forget(self, uuid: str) -> None:
        """It is gone, or has said that it writes no more. Idempotent."""
        self._hellos.pop(uuid, None)

    def gone(self) -> list[str]:
        """Processes of which every rank has ended, as far as that can be looked up from here."""
        return [
            uuid
            for uuid, hello in self._hellos.items()
            if hello.host_id == self._host_id
            and hello.pids
            and all(self._is_gone(pid, start_time) for pid, start_time in hello.pids)
        ]
