"""ZeroMQ sockets on an event loop: a link that is dialled, and the reader of any socket.

Raw sockets with a reader on ZeroMQ's descriptor, not `zmq.asyncio`: one wake of the loop takes every message
that has arrived, and no future is made for any. Sends never wait. May import `errors`, `protocol`, `security`
and `telemetry` only. Read `dealer.py` first.
"""

from disagg.links.dealer import DISCONNECTED, DealerLink, LinkEvents, LinkKind
from disagg.links.reader import SocketReader

__all__ = ["DISCONNECTED", "DealerLink", "LinkEvents", "LinkKind", "SocketReader"]
