"""Copies into another process's memory: right to the byte, and over when their process is."""

import multiprocessing
import os
import signal
import time
from multiprocessing.connection import Connection

import numpy as np
import pytest
import torch

from disagg._cuda import PeerCopier
from disagg.transfer import is_process_gone, process_start_time
from support.system import eventually

SPAWN = multiprocessing.get_context("spawn")
GUARD = 4096
ROWS, ROW_BYTES = 256, 1 << 20


def wait(copier: PeerCopier, copy: int) -> None:
    eventually(lambda: copier.is_done(copy), "the end of a copy")


@pytest.mark.parametrize("num_runs", [1, 2, 3, 1000, 1024, 1025, 2500])
@pytest.mark.parametrize("blocks", [1, 7, 132])
def test_every_run_and_nothing_else_is_copied(num_runs: int, blocks: int) -> None:
    """Runs of all lengths, at all places, through the seams between blocks, kernels and allocations."""
    draw = np.random.default_rng(num_runs * 1000 + blocks)
    lengths = 16 * draw.integers(1, 1 + 65536 // num_runs * 3, num_runs)
    gaps = 16 * draw.integers(0, 3, num_runs)
    ends = np.cumsum(lengths + gaps)
    order = draw.permutation(num_runs)
    sources = (ends - lengths)[order]
    shuffled = lengths[order]
    targets = np.cumsum(shuffled + 16) - shuffled + GUARD
    source = torch.from_numpy(draw.integers(0, 256, int(ends[-1]), np.uint8)).cuda()
    target = torch.full((int(targets[-1] + shuffled[-1]) + GUARD,), 0xAB, dtype=torch.uint8, device="cuda")
    expected = target.cpu().numpy()
    for at, where, length in zip(sources, targets, shuffled, strict=True):
        expected[where : where + length] = source[at : at + length].cpu().numpy()
    copier = PeerCopier(0, blocks)
    torch.cuda.synchronize()
    wait(copier, copier.copy(source.data_ptr(), target.data_ptr(), sources, targets, shuffled))
    np.testing.assert_array_equal(target.cpu().numpy(), expected)


@pytest.mark.parametrize("bad", [(8, 0, 16), (0, 8, 16), (0, 0, 8), (0, 0, 0), (-16, 0, 16)])
def test_what_the_kernel_cannot_copy_is_refused(bad: tuple[int, int, int]) -> None:
    memory = torch.zeros(1024, dtype=torch.uint8, device="cuda")
    columns = [np.array([number], np.int64) for number in bad]
    with pytest.raises(ValueError, match="multiples of 16"):
        PeerCopier(0, 1).copy(memory.data_ptr(), memory.data_ptr(), *columns)


def test_a_handle_of_nothing_is_told_and_harms_nothing() -> None:
    copier = PeerCopier(0, 1)
    with pytest.raises(RuntimeError, match="cuda"):
        copier.open(bytes(64), 16)
    with pytest.raises(ValueError, match="64 bytes"):
        copier.open(b"", 16)
    assert torch.ones(4, device="cuda").sum().item() == 4


def _write_for_long(handle: bytes, offset: int, pipe: Connection) -> None:
    """Keep one multiprocessor copying for seconds, with everything queued on the device."""
    rows = torch.arange(ROWS, dtype=torch.int32, device="cuda")[:, None].expand(ROWS, ROW_BYTES // 4)
    source = rows.contiguous()
    torch.cuda.synchronize()
    copier = PeerCopier(0, 1)
    base = copier.open(handle, offset + ROWS * ROW_BYTES) + offset
    at = np.arange(ROWS, dtype=np.int64) * ROW_BYTES
    for turn in range(500):
        copier.copy(source.data_ptr(), base, np.roll(at, turn), at, np.full(ROWS, ROW_BYTES, np.int64))
    pipe.send(None)
    time.sleep(60)


def test_a_source_that_is_proven_gone_writes_no_more() -> None:
    """A decode worker gives the pages to others then. Seconds of copies were queued."""
    target = torch.full((ROWS, ROW_BYTES // 4), -1, dtype=torch.int32, device="cuda")
    handle, offset = PeerCopier(0, 1).handle(target.data_ptr())
    here, there = SPAWN.Pipe()
    source = SPAWN.Process(target=_write_for_long, args=(handle, offset, there), daemon=True)
    source.start()
    here.recv()
    assert source.pid is not None
    started_at = process_start_time(source.pid)
    assert started_at is not None
    eventually(lambda: int((target[:, -1] >= 0).sum()) > ROWS // 2, "pages that arrive")
    changing = target[:, 0].clone()
    eventually(lambda: bool((target[:, 0] != changing).any()), "pages that change")
    os.kill(source.pid, signal.SIGKILL)
    eventually(lambda: is_process_gone(source.pid, started_at), "its end")  # type: ignore[arg-type]
    before = target.clone()
    # Longer than a copy takes, so that one under way would show.
    until = time.monotonic() + 0.5
    while time.monotonic() < until:
        assert torch.equal(target, before)
    source.join()
