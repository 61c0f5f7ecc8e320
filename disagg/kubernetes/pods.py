"""Pods to proofs: which have ended for certain. Pure functions over records.

A pod has ended when its phase says so. A kubelet reports `Succeeded` or `Failed` once no container of it can
still run; the pod garbage collector reports `Failed` when somebody has deleted the pod's Node or tainted it
out-of-service, who answers for it that the machine is off. An object that is merely gone proves nothing:
a pod on a node that nobody reaches may be force-deleted, and runs on.
"""

from collections.abc import Iterable

from msgspec import Struct, field

from disagg.kubernetes.watch import Metadata

INSTANCE_LABEL = "app.kubernetes.io/instance"
ENDED_PHASES = ("Succeeded", "Failed")
NAMED_ONCE_BY = "ReplicaSet"
"""Its pods' names are random. A StatefulSet's, and so a LeaderWorkerSet's, come again."""


class PodIP(Struct, frozen=True):
    """One address, of one family."""

    ip: str = ""


class Terminated(Struct, frozen=True, rename="camel"):
    """How a container's process ended. `message` is the end of its log where it wrote none itself."""

    exit_code: int = 0
    message: str = ""
    finished_at: str | None = None
    container_id: str = field(default="", name="containerID")


class ContainerState(Struct, frozen=True):
    """Whether it has ended."""

    terminated: Terminated | None = None


class ContainerStatus(Struct, frozen=True, rename="camel"):
    """How a container is, and how the one before it in its place was."""

    name: str = ""
    state: ContainerState = ContainerState()
    last_state: ContainerState = ContainerState()


class PodStatus(Struct, frozen=True, rename="camel"):
    """How a pod is."""

    phase: str = ""
    pod_ip: str = field(default="", name="podIP")
    pod_ips: list[PodIP] | None = field(default=None, name="podIPs")
    container_statuses: list[ContainerStatus] | None = None


class Pod(Struct, frozen=True):
    """One pod."""

    metadata: Metadata
    status: PodStatus = PodStatus()

    @property
    def ips(self) -> frozenset[str]:
        """Its addresses, as far as they are told."""
        ips = {self.status.pod_ip, *(each.ip for each in self.status.pod_ips or [])}
        return frozenset(ips - {""})


class PodEnd(Struct, frozen=True):
    """A pod that has ended: no process of it runs."""

    name: str
    ips: frozenset[str]


def end_of(pod: Pod, ips_before: frozenset[str] = frozenset()) -> PodEnd | None:
    """Say that a pod has ended; None where that is not proven, or not whose end it is.

    No proof for the pods of a LeaderWorkerSet, whose names come again: a late word of an old pod's end
    would be taken for the new one's. Nor would one pod's end be that of a worker on several nodes.

    Args:
        pod: As it was last seen.
        ips_before: What it told earlier: kubelets 1.27 to 1.30 report the end without addresses at first
            (kubernetes/kubernetes#125370).
    """
    ips = pod.ips or ips_before
    owners = [owner.kind for owner in pod.metadata.owner_references or []]
    if pod.status.phase not in ENDED_PHASES or owners != [NAMED_ONCE_BY] or not ips:
        return None
    return PodEnd(pod.metadata.name, ips)


class PodEnds:
    """Finds the ends in what a watch tells."""

    def __init__(self) -> None:
        self._ips: dict[str, frozenset[str]] = {}
        """By uid, of the pods that were there at last."""
        self._told: frozenset[PodEnd] = frozenset()

    def take(self, pods: Iterable[Pod], removed: Pod | None) -> frozenset[PodEnd]:
        """Return the ends that are new, given all pods and the last state of one that has just gone."""
        seen = [*pods, *([] if removed is None else [removed])]
        uids = {pod.metadata.uid: pod for pod in seen}
        self._ips = {uid: pod.ips or self._ips.get(uid, frozenset()) for uid, pod in uids.items()}
        ends = frozenset(end for uid, pod in uids.items() if (end := end_of(pod, self._ips[uid])) is not None)
        new, self._told = ends - self._told, ends
        return new
