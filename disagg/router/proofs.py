"""What proves that a worker's process is gone, so that nothing it wrote can still arrive.

A proof is taken while the process lives, of one that has just said who it is, and looked at once it is lost.
Each source gives one or none. A broken link, silence, or an address that is in no slice prove nothing.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterable
from typing import Protocol
from urllib.parse import urlsplit

import psutil

from disagg.kubernetes import PodEnd
from disagg.protocol import Welcome
from disagg.security import host_of, is_loopback

MAX_ENDED = 10_000
"""Ended pods that are remembered: a link may be found broken long after the pod's object is gone."""


class Proof(Protocol):
    """Of the end of one worker's process, with all its ranks."""

    def is_gone(self) -> bool:
        """Whether the end is proven."""


TakeProof = Callable[[str, Welcome], Proof | None]
"""By a worker's address and what it has said; None where nothing will prove its end."""


class ProcessProof:
    """The processes behind a worker's address, pinned while it lived."""

    def __init__(self, processes: list[psutil.Process]) -> None:
        self._processes = processes

    @classmethod
    def take(cls, address: str, welcome: Welcome) -> ProcessProof | None:
        """Pin its ranks' processes; None where they cannot be told apart from here.

        A pid says little: another pid namespace numbers other processes. That rank 0 listens on the
        very address, and that the other ranks descend from it, says that these are the ones.
        """
        try:
            processes = [psutil.Process(pid) for pid in welcome.rank_pids]
            if not processes or not _listens(processes[0], address):
                return None
            family = {child.pid for child in processes[0].children(recursive=True)}
            return cls(processes) if all(p.pid in family for p in processes[1:]) else None
        except psutil.Error:
            return None

    def is_gone(self) -> bool:
        """Whether every one has ended. A zombie has: its memory and its links are gone."""
        return not any(_is_alive(process) for process in self._processes)


class EndedPods:
    """The pods that have ended, which are the proof for the workers in them."""

    def __init__(self) -> None:
        self._ended: OrderedDict[tuple[str, str], None] = OrderedDict()

    def add(self, ends: Iterable[PodEnd]) -> None:
        """Take in what discovery tells."""
        self._ended.update(dict.fromkeys((end.name, ip) for end in ends for ip in end.ips))
        while len(self._ended) > MAX_ENDED:
            self._ended.popitem(last=False)

    def has(self, name: str, ip: str) -> bool:
        """Whether this pod is known to have ended."""
        return (name, ip) in self._ended

    def take(self, address: str, welcome: Welcome) -> PodProof | None:
        """Watch for the end of a worker's pod: it is called after the pod, and advertises its address.

        None also where such a pod has ended already: whoever speaks now is in another.
        """
        host = host_of(address)
        if host is None or self.has(welcome.worker_id, host):
            return None
        return PodProof(self, welcome.worker_id, host)


class PodProof:
    """The pod behind a worker's address."""

    def __init__(self, pods: EndedPods, name: str, ip: str) -> None:
        self._pods = pods
        self._name = name
        self._ip = ip

    def is_gone(self) -> bool:
        """Whether it has ended."""
        return self._pods.has(self._name, self._ip)


class PodSuccessors:
    """Workers that came after another in one pod, whose end they prove.

    A kubelet starts a container anew once the one before has ended, in the same pod; and a pod's uid,
    unlike its name and its addresses, is never another's.
    """

    def __init__(self) -> None:
        self._newest: OrderedDict[str, str] = OrderedDict()

    def take(self, address: str, welcome: Welcome) -> SuccessorProof | None:
        """Watch for the next worker in its pod; None where it is in none."""
        del address
        if not welcome.pod_uid:
            return None
        self._newest[welcome.pod_uid] = welcome.uuid
        self._newest.move_to_end(welcome.pod_uid)
        if len(self._newest) > MAX_ENDED:
            self._newest.popitem(last=False)
        return SuccessorProof(self, welcome.pod_uid, welcome.uuid)

    def has(self, pod_uid: str, after: str) -> bool:
        """Whether another worker has come after this one in its pod."""
        return self._newest.get(pod_uid, after) != after


class SuccessorProof:
    """The worker that comes after this one in its pod."""

    def __init__(self, pods: PodSuccessors, pod_uid: str, uuid: str) -> None:
        self._pods = pods
        self._pod_uid = pod_uid
        self._uuid = uuid

    def is_gone(self) -> bool:
        """Whether it has come."""
        return self._pods.has(self._pod_uid, self._uuid)


def _listens(process: psutil.Process, address: str) -> bool:
    if address.startswith("ipc://"):
        path = address.removeprefix("ipc://")
        return any(str(connection.laddr) == path for connection in process.net_connections("unix"))
    port = urlsplit(address).port
    # The same number may listen on the same port of another machine.
    if not _is_here(urlsplit(address).hostname):
        return False
    return any(
        connection.status == psutil.CONN_LISTEN and connection.laddr.port == port
        for connection in process.net_connections("tcp")
    )


def _is_here(host: str | None) -> bool:
    if host is None or is_loopback(host):
        return host is not None
    return any(host == own.address for addresses in psutil.net_if_addrs().values() for own in addresses)


def _is_alive(process: psutil.Process) -> bool:
    try:
        return process.is_running() and process.status() not in (psutil.STATUS_ZOMBIE, psutil.STATUS_DEAD)
    except psutil.Error:
        return False
