"""Every message that crosses a process boundary, and its one codec.

Depends on nothing else of ours. msgspec structs as arrays with explicit tags, msgpack on the
wire; no pickle anywhere. New fields go last and have a default. Start with `control.py` (router
and worker), then `peer.py` (prefill and decode worker), `summary.py` (prefix summaries).
"""

from disagg.protocol.codec import decoder, encode
from disagg.protocol.control import (
    Abort,
    Accepted,
    Failed,
    Fenced,
    FirstToken,
    FromWorker,
    Generate,
    Goodbye,
    Hello,
    KvReceived,
    Load,
    Prefill,
    PrefillDone,
    Rejected,
    RejectReason,
    Release,
    Renew,
    Reserve,
    Reserved,
    Role,
    SequenceTokens,
    SnapshotRequest,
    Target,
    Tokens,
    ToWorker,
    Welcome,
    WorkerState,
)
from disagg.protocol.peer import (
    FromPeer,
    KvLayout,
    PeerBye,
    PeerFence,
    PeerFenced,
    PeerHello,
    PushDone,
    RankEndpoint,
)
from disagg.protocol.router import AskRecord, RecordAnswer
from disagg.protocol.sampling import FinishReason, SamplingParams
from disagg.protocol.summary import SummaryDelta, SummaryDigest, SummarySnapshot

PROTOCOL_VERSION = 1

__all__ = [
    "PROTOCOL_VERSION",
    "Abort",
    "Accepted",
    "AskRecord",
    "Failed",
    "Fenced",
    "FinishReason",
    "FirstToken",
    "FromPeer",
    "FromWorker",
    "Generate",
    "Goodbye",
    "Hello",
    "KvLayout",
    "KvReceived",
    "Load",
    "PeerBye",
    "PeerFence",
    "PeerFenced",
    "PeerHello",
    "Prefill",
    "PrefillDone",
    "PushDone",
    "RankEndpoint",
    "RecordAnswer",
    "RejectReason",
    "Rejected",
    "Release",
    "Renew",
    "Reserve",
    "Reserved",
    "Role",
    "SamplingParams",
    "SequenceTokens",
    "SnapshotRequest",
    "SummaryDelta",
    "SummaryDigest",
    "SummarySnapshot",
    "Target",
    "ToWorker",
    "Tokens",
    "Welcome",
    "WorkerState",
    "decoder",
    "encode",
]
