"""Moving KV pages from one worker's pool into another's.

Owns the plan (which byte runs go where), the transports that carry them and the thread that
drives one. May import `protocol`, `errors`, `nccl` and `kv.layout`; torch in the probe's processes, and where
`nccl.py` needs a stream. Read `plan.py`, then `mover.py`, which is the state machine of a push; `base.py` is
the seam to a transport, `nixl.py` the only file that knows NIXL, `cuda_ipc.py` the shorter way between GPUs
of one host, and `nccl.py` the way of NCCL.
"""

from disagg.transfer.base import PoolMemory, Transport
from disagg.transfer.factory import TRANSPORTS, make_transport, prepare_environment
from disagg.transfer.host import host_id, is_process_gone, process_start_time
from disagg.transfer.mover import (
    AbortPush,
    Arrived,
    AwaitKv,
    Command,
    Connect,
    Connected,
    ConnectFailed,
    Disconnect,
    Drain,
    Drained,
    Event,
    Fenced,
    FinishPush,
    PushChunk,
    PushComplete,
    PushFailed,
    PushKey,
    check_hello,
)
from disagg.transfer.plan import check_layouts, expected_bytes, pairs, plan_transfer
from disagg.transfer.probe import ProbeResult, probe_transport
from disagg.transfer.slow import SLOW_BYTES_PER_S, LinkFacts, why_slow
from disagg.transfer.thread import TransferThread

__all__ = [
    "SLOW_BYTES_PER_S",
    "TRANSPORTS",
    "AbortPush",
    "Arrived",
    "AwaitKv",
    "Command",
    "Connect",
    "ConnectFailed",
    "Connected",
    "Disconnect",
    "Drain",
    "Drained",
    "Event",
    "Fenced",
    "FinishPush",
    "LinkFacts",
    "PoolMemory",
    "ProbeResult",
    "PushChunk",
    "PushComplete",
    "PushFailed",
    "PushKey",
    "TransferThread",
    "Transport",
    "check_hello",
    "check_layouts",
    "expected_bytes",
    "host_id",
    "is_process_gone",
    "make_transport",
    "pairs",
    "plan_transfer",
    "prepare_environment",
    "probe_transport",
    "process_start_time",
    "why_slow",
]
