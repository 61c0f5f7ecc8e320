"""Large memory: begins at a huge page, costs what is touched, lives as long as a tensor in it."""

import gc
from pathlib import Path

import torch

from disagg.layers.memory import HUGE_PAGE_BYTES, allocate


def resident_bytes() -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmRSS:")) * 1024


def test_it_begins_at_a_huge_page_and_is_zero() -> None:
    memory = allocate(3 * HUGE_PAGE_BYTES + 5)
    assert memory.data_ptr() % HUGE_PAGE_BYTES == 0
    assert len(memory) == 3 * HUGE_PAGE_BYTES + 5
    assert not memory.any()


def test_untouched_memory_costs_nothing() -> None:
    """A pool of pages that no request has used yet must not take the machine's memory."""
    before = resident_bytes()
    memory = allocate(1 << 30)
    memory[:100] = 1
    assert resident_bytes() - before < 64e6


def test_a_part_keeps_the_whole_alive_and_the_last_part_frees_it() -> None:
    before = resident_bytes()
    part = allocate(200_000_000).fill_(7)[-10:].view(torch.int16)
    gc.collect()
    assert part.tolist() == [0x0707] * 5
    assert resident_bytes() - before > 190e6
    del part
    gc.collect()
    assert resident_bytes() - before < 20e6
