"""Routing: the registry of workers, the prefix index, the queue, placing, dispatch and the ledger.

May import `_core`, `checkpoint`, `config`, `errors`, `frontend`, `kubernetes`, `links`, `protocol`,
`security` and `telemetry`; never torch. Read `dispatch.py` first, then `sequence.py`, the life of one
sequence, and `policy.py`, which decides where it lives. `app.py` is the process.
"""

from disagg.router.dispatch import Dispatcher
from disagg.router.ledger import Ledger
from disagg.router.links import Connector, Link, ZmqConnector, check_address
from disagg.router.membership import Membership
from disagg.router.registry import Registry
from disagg.router.service import RouterService

__all__ = [
    "Connector",
    "Dispatcher",
    "Ledger",
    "Link",
    "Membership",
    "Registry",
    "RouterService",
    "ZmqConnector",
    "check_address",
]
