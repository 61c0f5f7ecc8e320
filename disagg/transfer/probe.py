"""Measure a page push between two processes of this machine: what `disagg doctor` reports.

The fast way between two processes (shared memory, CUDA IPC) is never assumed: it fails across
pid namespaces and under some seccomp profiles, and UCX then falls back to TCP without a word.
"""

import os
import re
import subprocess
import sys
import time
from typing import Literal

import msgspec
import numpy as np

from disagg.errors import TransferError, TransferTimeout
from disagg.kv.layout import PageLayout
from disagg.protocol import PROTOCOL_VERSION, KvLayout, PeerHello, encode
from disagg.transfer.base import PoolMemory
from disagg.transfer.factory import make_transport, prepare_environment
from disagg.transfer.host import host_id
from disagg.transfer.mover import (
    Connect,
    ConnectFailed,
    Event,
    FinishPush,
    KvMover,
    PushChunk,
    PushComplete,
    PushFailed,
)

NUM_PAGES = 256
LAYOUT = KvLayout(page_size=16, num_kv_heads=3, num_layers=30, head_dim=64, dtype="bfloat16", tp_size=1)
"""SmolLM2-135M's: 360 KiB a page."""
GPU_LAYOUT = KvLayout(page_size=16, num_kv_heads=8, num_layers=32, head_dim=128, dtype="bfloat16", tp_size=1)
"""Llama-3-8B's: 2 MiB a page."""
Device = Literal["cpu", "cuda"]
NUM_PUSHES = 6
"""The first ones open the link; the fastest counts."""
_LANE = re.compile(r"\|\s*(?:\d+% on )?([a-z0-9_]+)/")


class ProbeResult(msgspec.Struct, frozen=True):
    """What one push of pages between two processes gave."""

    backend: str
    """The transport asked for."""
    lane: str
    """What UCX chose to carry large writes, for example `cma`, `tcp`, `cuda_ipc`; or `unknown`; empty
    where it was not UCX's to choose."""
    num_bytes: int
    seconds: float
    """Of the fastest push, from its post to its end."""

    @property
    def transport(self) -> str:
        """Name what carried it, for example `nixl (UCX cma)`."""
        return f"{self.backend} (UCX {self.lane})" if self.lane else self.backend

    @property
    def gigabytes_per_s(self) -> float:
        """Rate of the fastest push, in 10^9 bytes a second."""
        return self.num_bytes / self.seconds / 1e9


def probe_transport(name: str = "nixl", timeout_s: float = 30.0, *, device: Device = "cpu") -> ProbeResult:
    """Push 256 scattered pages from one new process into another and time it.

    Args:
        name: The transport.
        timeout_s: For all of it.
        device: Where both pools are; `cuda` is the first GPU.

    Raises:
        TransferError: a process could not start the transport, or the push failed; its words.
        TransferTimeout: it took longer than `timeout_s`.
    """
    environ = dict(os.environ)
    prepare_environment(environ)
    # Makes UCX print what it chose for each kind of message.
    environ["UCX_PROTO_INFO"] = "y"
    source, target = (_start(side, name, device, environ) for side in ("source", "target"))
    try:
        # The two start side by side; the source waits for its first line of input.
        output, errors = source.communicate(_read_hello(target), timeout=timeout_s)
    except subprocess.TimeoutExpired as error:
        raise TransferTimeout(f"no push between two processes within {timeout_s:.0f} s") from error
    finally:
        for child in (source, target):
            child.kill()
            child.communicate()
    if source.returncode != 0:
        raise TransferError(_last_line(errors) or f"the pushing process ended with {source.returncode}")
    return to_result(name, output)


def to_result(name: str, output: str) -> ProbeResult:
    """Read what the pushing process printed: UCX's choices, and its own last line."""
    num_bytes, seconds = output.rpartition("pushed ")[2].split()
    lane = find_lane(output) if name == "nixl" else ""
    return ProbeResult(name, lane, int(num_bytes), float(seconds))


def find_lane(proto_info: str) -> str:
    """Find in UCX's tables what carries large writes to another process; `unknown` without one.

    A table has a title (`| remote memory write by ucp_put*(multi) from host …`) under a line that
    names the link (`intra-node cfg#1`), and rows `| range | how | lane/device |`.
    """
    lane, in_table, link = "unknown", False, ""
    for line in proto_info.splitlines():
        if " cfg#" in line:
            link = line
        elif " by ucp_" in line:
            in_table = "ucp_put" in line and " self " not in link
        elif in_table and "..inf" in line and (found := _LANE.search(line)):
            lane = found[1]
    return lane


def _start(side: str, name: str, device: Device, environ: dict[str, str]) -> "subprocess.Popen[str]":
    # Not `-m`: the package has imported this module already, and runpy warns of a second copy.
    program = "import sys; from disagg.transfer.probe import main; main(*sys.argv[1:])"
    return subprocess.Popen(  # noqa: S603 - our own interpreter and program
        [sys.executable, "-c", program, side, name, device],
        env=environ,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def _read_hello(target: "subprocess.Popen[str]") -> str:
    """Wait for the target's hello among whatever its libraries print."""
    assert target.stdout is not None, "opened with a pipe"
    for line in target.stdout:
        if line.startswith("hello "):
            return line
    raise TransferError(_last_line(target.communicate()[1]) or "the receiving process ended at once")


def _last_line(text: str) -> str:
    return next(reversed(text.strip().splitlines()), "")


# In the two processes


def main(side: str, name: str, device: Device) -> None:
    """Be one of the two processes of `probe_transport`."""
    layout = LAYOUT if device == "cpu" else GPU_LAYOUT
    transport = make_transport(name, uuid=f"probe-{side}", rank=0, pool=_make_pool(layout, device))
    mover = KvMover(transport, layout, 0, time.monotonic)
    if side == "source":
        _push(mover, msgspec.msgpack.decode(bytes.fromhex(sys.stdin.readline().split()[1]), type=PeerHello))
        return
    hello = PeerHello(
        PROTOCOL_VERSION, "probe", f"probe-{side}", layout, [transport.endpoint()], host_id(), []
    )
    print("hello", encode(hello).hex(), flush=True)
    # Until killed, or orphaned: a receiver has to progress for its sender's writes to end.
    parent = os.getppid()
    while os.getppid() == parent:
        mover.poll()
        time.sleep(0.0002)


def _make_pool(layout: KvLayout, device: Device) -> PoolMemory:
    shape = (NUM_PAGES, PageLayout.of(layout).page_bytes)
    if device == "cpu":
        return PoolMemory.of_array(np.ones(shape, np.uint8))
    import torch

    pool = torch.ones(shape, dtype=torch.uint8, device="cuda:0")
    torch.cuda.synchronize()
    return PoolMemory.of_tensor(pool)


def _push(mover: KvMover, target: PeerHello) -> None:
    _raise_failure(mover.on_command(Connect(target)))
    pages = np.random.default_rng(0).permutation(NUM_PAGES).tolist()
    fastest: PushComplete | None = None
    for generation in range(NUM_PUSHES):
        key = ("probe", generation)
        deadline = time.monotonic() + 20.0
        events = mover.on_command(PushChunk(key, target.uuid, pages, pages, deadline))
        events += mover.on_command(FinishPush(key, token_id=0, position=0, finished=True))
        while not events:
            events = mover.poll()
        _raise_failure(events)
        for event in events:
            if isinstance(event, PushComplete) and (fastest is None or event.seconds < fastest.seconds):
                fastest = event
    assert fastest is not None, "a push ends in failure or completion"
    print("pushed", fastest.num_bytes, fastest.seconds, flush=True)


def _raise_failure(events: list[Event]) -> None:
    for event in events:
        if isinstance(event, ConnectFailed | PushFailed):
            raise event.error
