"""What bounds decode attention: what reading alone reaches on this card, and where a launch's time goes.

    python benchmarks/engine/decode_trace.py [--shape 16,8] [--rows 256] [--long 2000] [--rounds 10]

First kernels that only read the pool, in the order of the attention kernel: units of 8 KB a warp, by tensor
maps of several views and by plain copies; and all of it in order of address, 16 bytes a thread. Then the
attention kernel itself, built with DISAGG_DECODE_TRACE: when its warps start, have their first unit, their
last, and are done, by the card's timer, over all layers of some replays; and what of that belongs to the SM.
Compiles decode_trace.cu beside it by the nvcc in PATH, CUDA_HOME or the environment's wheels.
"""

import argparse
import ctypes
import os
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import NamedTuple

import torch
from decode_attention import Batch, Shape, copy_bandwidth, uneven
from replay import replay_us
from torch import Tensor

ROOT = Path(__file__).parents[2]
POINTS = ("start", "released", "first unit", "last unit", "merged")
RECORDS = (64, 256, 8, len(POINTS) + 1)  # layer, block, warp, point and SM

PLAIN, HALVES, IN_ORDER, EIGHTS, WHOLE = range(5)
VIEWS = ("plain", "halves", "in order", "eights", "whole")


class Read(NamedTuple):
    """How a kernel that only reads loads its units: as decode_trace.cu names it."""

    view: int
    promotion: int = 0
    evict_first: bool = True
    copies: int = 1
    stages: int = 3
    by_counter: bool = False

    def __str__(self) -> str:
        how = f"{self.copies} copies" if self.view == PLAIN else f"promotion {self.promotion}"
        hint = "first" if self.evict_first else "normal"
        counter = ", counter" if self.by_counter else ""
        return f"{VIEWS[self.view]}, {how}, evict {hint}, {self.stages * 64} KB{counter}"


READS = (
    Read(HALVES, 256),
    Read(HALVES, 256, evict_first=False),
    Read(HALVES, 128),
    Read(HALVES, 0),
    Read(IN_ORDER, 0),
    Read(EIGHTS, 0),
    Read(WHOLE, 0),
    Read(PLAIN),
    Read(PLAIN, by_counter=True),
    Read(PLAIN, stages=2),
    Read(PLAIN, copies=2),
    Read(PLAIN, copies=8),
    Read(PLAIN, copies=32),
)


def compiled(into: Path) -> ctypes.CDLL:
    """decode_trace.cu as a library."""
    wheels = Path(sysconfig.get_path("purelib"), "nvidia", "cu13")
    homes = [Path(os.environ[name]) for name in ("CUDA_HOME",) if name in os.environ]
    places = os.pathsep.join([*(str(home / "bin") for home in [*homes, wheels]), os.environ.get("PATH", "")])
    nvcc = shutil.which("nvcc", path=places)
    if nvcc is None:
        sys.exit("there is no nvcc: set CUDA_HOME, or pip install --group cuda-build")
    library = into / "decode_trace.so"
    source = Path(__file__).with_suffix(".cu")
    options = ["-std=c++20", "-O3", "-gencode=arch=compute_90a,code=sm_90a", "-shared", "-Xcompiler=-fPIC"]
    paths = ["-cudart=static", f"-I{ROOT / 'csrc'}", f"-L{wheels / 'lib'}"]
    subprocess.run([nvcc, *options, *paths, "-o", str(library), str(source)], check=True)
    return ctypes.CDLL(str(library))


class Library:
    """The compiled functions, with tensors for arguments and errors as exceptions."""

    def __init__(self, library: ctypes.CDLL) -> None:
        self._library = library

    def call(self, name: str, *arguments: Tensor | int | bool | None) -> int:
        """A function's result. 64-bit integers and pointers alike; a 32-bit parameter takes the low half."""
        function = getattr(self._library, name)
        function.restype = ctypes.c_int64
        values = [x.data_ptr() if isinstance(x, Tensor) else x or 0 for x in arguments]
        return int(function(*map(ctypes.c_int64, values)))

    def launch(self, name: str, *arguments: Tensor | int | bool | None) -> None:
        """A function that takes the stream last and returns a cudaError_t."""
        status = self.call(name, *arguments, torch.cuda.current_stream().cuda_stream) & 0xFFFFFFFF
        if status != 0:
            sys.exit(f"{name}: CUDA error {status}")


def print_reads(library: Library, shape: Shape, batch: Batch, sms: int, rounds: int) -> None:
    """Bandwidth of kernels that only read."""
    pages = batch.page_indices.long()
    parts = []
    for begin, end in zip(batch.indptr[:-1], batch.indptr[1:], strict=True):
        heads = torch.arange(shape.kv_heads, device="cuda")[:, None]
        parts.append(((pages[begin:end] * shape.kv_heads + heads) * batch.layers).flatten())
    runs = torch.cat(parts).int()
    taken = torch.zeros(batch.layers, dtype=torch.int32, device="cuda")
    num_bytes = runs.numel() * 8192

    def report(what: str, step: Callable[[], None], num_bytes: int) -> None:
        us = replay_us(step, batch.layers, rounds)
        print(f"  {what:<52}{us:>8.1f} us{num_bytes / us / 1e3:>7.0f} GB/s", flush=True)

    def reader(read: Read) -> Callable[[], None]:
        def step() -> None:
            if read.by_counter:
                taken.zero_()
            for layer in range(batch.layers):
                pool = (batch.pool, batch.pool.shape[0], batch.layers, layer)
                flags = (read.view, read.promotion, read.copies, read.evict_first)
                counter = taken if read.by_counter else None
                units = (runs, runs.numel(), read.stages, counter)
                library.launch("read_pool", shape.kv_heads, sms, *pool, *units, *flags)

        return step

    for read in READS:
        report(str(read), reader(read), num_bytes)

    in_order = batch.pool.nbytes // batch.layers
    never = torch.zeros(4, dtype=torch.int32, device="cuda")

    def stream() -> None:
        for layer in range(batch.layers):
            library.launch("read_stream", sms, batch.pool.data_ptr() + layer * in_order, in_order, never)

    report("all in order of address, 16 bytes a thread", stream, in_order)


def traced(
    library: Library, shape: Shape, batch: Batch, sms: int, replays: int, between: bool
) -> tuple[Tensor, float]:
    """Records of each replay's layers, [layers, blocks, warps, point and SM], and microseconds a layer.

    `between`: with a small kernel after each, as in a step, so that all blocks of the next start at once.
    """
    sizes = (shape.heads, shape.kv_heads, len(batch.kv_lens), sms)
    num_bytes = library.call("trace_workspace_bytes", *sizes)
    workspace = torch.empty(num_bytes, dtype=torch.uint8, device="cuda")
    out = torch.empty_like(batch.q)

    def plan() -> None:
        for _ in range(20):
            library.launch("trace_plan", *sizes, batch.lens, batch.page_indptr, workspace)

    print(f"  plan{replay_us(plan, 20, 10):>56.1f} us")

    def step() -> None:
        for layer in range(batch.layers):
            pool = (batch.q, batch.pool, batch.pool.shape[0], batch.layers, layer)
            tables = (batch.page_indices, batch.lens, batch.page_indptr)
            library.launch("trace_run", *sizes, *pool, *tables, out, workspace)
            if between:
                library.launch("trace_between", len(batch.kv_lens))

    us = replay_us(step, batch.layers, 10)
    records = []
    for _ in range(replays):
        with torch.cuda.stream(torch.cuda.Stream()):
            step()
        torch.cuda.synchronize()
        record = torch.zeros(RECORDS, dtype=torch.int64)
        if library.call("trace_read", record) & 0xFFFFFFFF:
            sys.exit("the records cannot be read")
        records.append(record[1 : batch.layers, :sms])  # the first layer follows no other
    return torch.cat(records), us


def print_trace(records: Tensor) -> None:
    """When what happened, microseconds after a launch's first block started; and by SM."""
    times = records[..., : len(POINTS)].double()
    times = (times - times[..., 0].amin((1, 2))[:, None, None, None]) / 1e3
    by_block = torch.cat([times[..., :3].amin(2), times[..., 3:].amax(2)], -1)
    print(f"  {'of blocks, us':<14}{'first':>8}{'10 %':>8}{'median':>8}{'90 %':>8}{'last':>8}")
    for point, name in enumerate(POINTS):
        ordered = by_block[..., point].sort(1).values
        places = [0, len(ordered[0]) // 10, len(ordered[0]) // 2, len(ordered[0]) * 9 // 10, -1]
        print(f"  {name:<14}" + "".join(f"{ordered[:, place].mean().item():>8.1f}" for place in places))
    waited = (times[..., 2] - times[..., 0]).flatten()
    print(f"  start to first unit, warps: median {waited.median():.1f}, most {waited.max():.1f}")
    last = times[..., 3]
    print(f"  last unit, within a block: {(last.amax(2) - last.amin(2)).mean():.1f} between its warps")
    ends = by_block[..., 3]
    idle = (ends.amax(1, True) - ends).mean()
    print(f"  idle after its last unit until the launch's last: {idle:.1f} a block")
    taken = ends - by_block[..., 1]
    late = taken - taken.mean(1, True)
    sms = records[:, :, 0, -1]
    num_sms = int(sms.max()) + 1
    count = torch.zeros(num_sms, dtype=torch.float64).index_add_(
        0, sms.flatten(), torch.ones(sms.numel()).double()
    )
    mean = torch.zeros(num_sms, dtype=torch.float64).index_add_(0, sms.flatten(), late.flatten()) / count
    rest = (late - mean[sms]).std().item()
    print(
        f"  a block's time beside the mean: by SM {mean.std():.1f}, apart from that {rest:.1f} (deviations)"
    )
    order = mean.argsort().tolist()
    for name, some in (("fastest", order[:8]), ("slowest", order[-8:])):
        print(f"  {name} SMs: " + ", ".join(f"{sm} {mean[sm]:+.1f}" for sm in some))


def main() -> None:
    ask = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    ask.add_argument("--shape", default="16,8", help="query and KV heads, of 128")
    ask.add_argument("--rows", type=int, default=256)
    ask.add_argument("--short", type=int, default=100)
    ask.add_argument("--long", type=int, default=2000)
    ask.add_argument("--rounds", type=int, default=10)
    ask.add_argument("--no-reads", action="store_true")
    a = ask.parse_args()
    torch.manual_seed(0)
    heads, kv_heads = map(int, a.shape.split(","))
    shape = Shape(f"{heads}/{kv_heads}", heads, kv_heads)
    sms = torch.cuda.get_device_properties("cuda").multi_processor_count
    batch = Batch(shape, uneven(a.rows, a.short, a.long))
    print(
        f"{torch.cuda.get_device_name()}; copy {copy_bandwidth():.0f} GB/s; {a.rows} x {a.short}..{a.long}, "
        f"{shape.name} heads, {batch.kv_bytes / 1e6:.0f} MB a layer"
    )
    with TemporaryDirectory() as folder:
        library = Library(compiled(Path(folder)))
        if not a.no_reads:
            print_reads(library, shape, batch, sms, a.rounds)
        for between in (False, True):
            records, us = traced(library, shape, batch, sms, replays=8, between=between)
            what = "attention, a kernel between" if between else "attention"
            print(f"  {what:<52}{us:>8.1f} us{batch.kv_bytes / us / 1e3:>7.0f} GB/s")
        print_trace(records)


if __name__ == "__main__":
    main()
