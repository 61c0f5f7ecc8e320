"""EndpointSlices to members: who is behind the Services of a release. Pure functions over records.

The records hold what we read of the API's objects (`discovery.k8s.io/v1`) and nothing else.
"""

from collections.abc import Iterable
from typing import Literal

from msgspec import Struct

from disagg.kubernetes.watch import Metadata
from disagg.security import host_port

Condition = Literal["ready", "not_ready", "terminating"]

SERVICE_LABEL = "kubernetes.io/service-name"
WORKER_SERVICES = ("prefill", "decode", "unified")
"""What follows the release's name in the names of the workers' headless Services."""
ROUTER_SERVICE = "router-peers"
"""The same of the routers' headless Service."""
CONTROL_PORT = "control"


class Conditions(Struct, frozen=True):
    """Of one endpoint; None where the API server does not say."""

    ready: bool | None = None
    serving: bool | None = None
    terminating: bool | None = None

    def to_condition(self) -> Condition:
        """Sum them up as the API documents them: not said is ready, serving as ready, not terminating."""
        if self.terminating:
            return "terminating"
        return "ready" if self.ready is not False or self.serving else "not_ready"


class TargetRef(Struct, frozen=True):
    """The pod behind an endpoint."""

    name: str = ""
    uid: str = ""


class Endpoint(Struct, frozen=True, rename="camel"):
    """One pod's address. Only the first one counts, as the API documents."""

    addresses: list[str]
    conditions: Conditions = Conditions()
    target_ref: TargetRef | None = None


class Port(Struct, frozen=True):
    """A port of every endpoint of a slice."""

    name: str | None = None
    port: int | None = None


class EndpointSlice(Struct, frozen=True, rename="camel"):
    """Some endpoints of one Service, all of one address family."""

    metadata: Metadata
    address_type: str
    endpoints: list[Endpoint] | None = None
    ports: list[Port] | None = None

    @property
    def service(self) -> str:
        """The Service it belongs to."""
        return (self.metadata.labels or {}).get(SERVICE_LABEL, "")


class Member(Struct, frozen=True):
    """One pod of the release."""

    address: str
    """Of its control port, as links take it: `tcp://10.0.0.7:5600`."""
    condition: Condition
    pod: str = ""
    pod_uid: str = ""


def members_of(slices: Iterable[EndpointSlice], *, port: str = CONTROL_PORT) -> dict[str, Member]:
    """Find the pods behind slices, by address.

    A pod may be in several slices: for a moment twice, or once a family. It is one member, at its IPv4
    address where it has one; terminating where any slice says so, for that is never taken back. An
    address of two pods belongs to the one that is not terminating: addresses are used again.
    """
    pods: dict[str, Member] = {}
    for found in _endpoints(slices, port):
        key = found.pod_uid or found.address
        pods[key] = _same_pod(pods[key], found) if key in pods else found
    members: dict[str, Member] = {}
    for key in sorted(pods):
        found = pods[key]
        other = members.get(found.address)
        if other is None or other.condition == "terminating":
            members[found.address] = found
    return members


def _endpoints(slices: Iterable[EndpointSlice], port: str) -> Iterable[Member]:
    for part in slices:
        number = next((p.port for p in part.ports or [] if p.name == port and p.port is not None), None)
        if number is None or part.address_type not in ("IPv4", "IPv6"):
            continue
        for endpoint in part.endpoints or []:
            if endpoint.addresses:
                address = f"tcp://{host_port(endpoint.addresses[0], number)}"
                ref = endpoint.target_ref or TargetRef()
                yield Member(address, endpoint.conditions.to_condition(), ref.name, ref.uid)


def _same_pod(one: Member, other: Member) -> Member:
    """Merge what two slices say of one pod."""
    first = min(one, other, key=lambda member: ("[" in member.address, member.address))
    conditions = {one.condition, other.condition}
    order: tuple[Condition, ...] = ("terminating", "ready", "not_ready")
    return Member(first.address, next(c for c in order if c in conditions), first.pod, first.pod_uid)
