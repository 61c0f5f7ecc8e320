"""What discovery's members mean for the workers: whom to connect, to retire, to let go of.

A pure plan, and the few lines that carry it out. Workers given by address are none of its business.
"""

import logging
from collections.abc import Mapping

from msgspec import Struct

from disagg.errors import ConfigError
from disagg.kubernetes import Condition, Member
from disagg.router.dispatch import Dispatcher
from disagg.router.registry import Standing
from disagg.telemetry import fields

log = logging.getLogger(__name__)


class MembershipPlan(Struct, frozen=True):
    """What is to be done; each list is sorted."""

    connect: list[str]
    standings: dict[str, Standing]
    """Workers whose standing becomes another."""


def plan_membership(known: Mapping[str, Standing], members: Mapping[str, Condition]) -> MembershipPlan:
    """Compare the workers that discovery has found before with the members there are.

    A new member is connected to once it is ready. One that is not ready any more keeps its standing: its
    link knows better whether it can be used. One that was on its way out and is ready again (another pod
    at its address) is let in again.
    """
    connect = sorted(a for a, condition in members.items() if a not in known and condition == "ready")
    standings: dict[str, Standing] = {}
    for address, standing in sorted(known.items()):
        condition = members.get(address)
        wanted: Standing
        if condition is None:
            wanted = "gone"
        elif condition == "ready":
            wanted = "in"
        else:
            wanted = "retired" if condition == "terminating" or standing == "gone" else standing
        if wanted != standing:
            standings[address] = wanted
    return MembershipPlan(connect, standings)


class Membership:
    """Carries out the plan. Owned by the loop thread."""

    def __init__(self, dispatcher: Dispatcher) -> None:
        self._dispatcher = dispatcher
        self._found: set[str] = set()

    def on_members(self, members: Mapping[str, Member]) -> None:
        """Take in who is there now."""
        registry = self._dispatcher.registry
        # Those that have been let go of since are not known any more.
        self._found = {address for address in self._found if registry.get(address) is not None}
        workers = {a: worker for a in self._found if (worker := registry.get(a)) is not None}
        plan = plan_membership(
            {address: worker.standing for address, worker in workers.items()},
            {address: member.condition for address, member in members.items()},
        )
        for address, standing in plan.standings.items():
            workers[address].standing = standing
            log.info("worker is %s %s", standing, fields(worker=workers[address].name, address=address))
        for address in plan.connect:
            if registry.get(address) is None:  # else it was given by address
                self._connect(address, members[address])
        self._dispatcher.poke()
        self._dispatcher.place_if_poked()

    def _connect(self, address: str, member: Member) -> None:
        try:
            self._dispatcher.connect(address)
        except ConfigError as error:
            log.error("member cannot be connected %s", fields(pod=member.pod, error=error))
            return
        self._found.add(address)
        log.info("member found %s", fields(pod=member.pod, address=address))
