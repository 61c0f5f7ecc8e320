"""What refusals and failures are called between processes.

The reason of a Failed is `KIND` or `KIND: WORDS`; routers decide and count by the kind:

    peer_lost         the decode worker's process or its control link is gone
    peer_unreachable  it does not answer, or speaks another protocol
    layout_mismatch   its pages are not ours
    link_lost         the KV link to it broke while it may well live
    timeout           the deadline passed
    transfer          the transport failed otherwise
    broken            the notifications of a transfer contradict each other
    expired           the router was silent for too long
    the engine ended it
"""

from disagg.engine import Refused
from disagg.errors import LayoutMismatch, LinkLost, TransferTimeout, WorkerError
from disagg.protocol import RejectReason


def reject_reason(refused: Refused) -> RejectReason:
    """Name a refusal to the router. What it should have checked itself can never fit: `too_long`."""
    match refused.reason:
        case "no_pages" | "queue_full" | "too_long":
            return refused.reason
        case "invalid":
            return "too_long"


def failure_reason(error: WorkerError) -> str:
    """Name an error of the transfer threads."""
    match error:
        case LinkLost():
            kind = "link_lost"
        case TransferTimeout():
            kind = "timeout"
        case LayoutMismatch():
            kind = "layout_mismatch"
        case _:
            kind = "transfer"
    return f"{kind}: {error}"
