"""Pods to sentences: which configurations cannot work, and why. Pure functions over records.

Such a process ends with status 2 and one line. The kubelet keeps the line in the pod's status, but its own
events say no more than that it backs off.
"""

from collections.abc import Iterable
from typing import Any

from msgspec import Struct

from disagg.kubernetes.pods import Pod

CONFIG_ERROR_STATUS = 2
"""Of the command line, for a `ConfigError` and for flags that it does not know."""
MAX_CHARS = 1024
"""Longer notes are refused by the API server."""


class Refusal(Struct, frozen=True):
    """One container that ended because of its configuration, and its last line."""

    pod: str
    pod_uid: str
    container: str
    container_id: str
    ended_at: str | None
    sentence: str

    def to_event(self, namespace: str) -> dict[str, Any]:
        """Make the event of the pod. Its name is the container's, so that all routers make one."""
        number = self.container_id.rpartition("/")[2][:16]
        return {
            "apiVersion": "v1",
            "kind": "Event",
            "metadata": {"name": f"{self.pod}.{number}", "namespace": namespace},
            "involvedObject": {
                "apiVersion": "v1",
                "kind": "Pod",
                "namespace": namespace,
                "name": self.pod,
                "uid": self.pod_uid,
                "fieldPath": f"spec.containers{{{self.container}}}",
            },
            "type": "Warning",
            "reason": "ConfigError",
            "message": self.sentence,
            "source": {"component": "disagg-router"},
            "firstTimestamp": self.ended_at,
            "lastTimestamp": self.ended_at,
            "count": 1,
        }


def refusals_of(pod: Pod) -> Iterable[Refusal]:
    """Find the containers of a pod that ended so, the running ones' predecessors too."""
    for status in pod.status.container_statuses or []:
        for state in (status.state, status.last_state):
            end = state.terminated
            if end is None or end.exit_code != CONFIG_ERROR_STATUS or not end.container_id:
                continue
            if lines := end.message.strip().splitlines():
                yield Refusal(
                    pod.metadata.name,
                    pod.metadata.uid,
                    status.name,
                    end.container_id,
                    end.finished_at,
                    lines[-1][:MAX_CHARS],
                )


class Refusals:
    """Finds those that are new in what a watch tells."""

    def __init__(self) -> None:
        self._told: frozenset[Refusal] = frozenset()

    def take(self, pods: Iterable[Pod]) -> frozenset[Refusal]:
        """Return the new ones, given all pods."""
        refusals = frozenset(refusal for pod in pods for refusal in refusals_of(pod))
        new, self._told = refusals - self._told, refusals
        return new
