"""The buffer that decode graphs read: every input where its window says, padding past the batch."""

import random

import numpy as np
import pytest
import torch

from disagg.engine.batch import build_tensors
from disagg.engine.plan import StepPlan, int32s
from disagg.engine.windows import PLACES, RowWindows, graph_sizes
from support.engines import make_request, make_scheduler
from support.fake_runner import FakeRunner

POISON = -99


def decode_plans(page_size: int, rng: random.Random) -> list[StepPlan]:
    scheduler = make_scheduler(64, page_size, max_num_seqs=8, max_num_batched_tokens=64)
    runner = FakeRunner(64, page_size, 11)
    for i in range(6):
        prompt = [rng.randint(0, 10) for _ in range(rng.randint(1, 9))]
        sampling = {"temperature": rng.random(), "seed": rng.getrandbits(64), "top_p": rng.random()}
        scheduler.add(
            make_request(f"r{i}", prompt, max_tokens=rng.randint(2, 9), ignore_eos=True, **sampling)
        )
    plans = []
    while (plan := scheduler.plan()) is not None:
        scheduler.retire(plan, runner.run(plan))
        if plan.num_decodes == plan.num_rows:
            plans.append(plan)
    return plans


@pytest.mark.parametrize("page_size", [1, 3, 4])
def test_windows_hold_what_an_unpadded_step_has(page_size: int) -> None:
    rng = random.Random(page_size)
    windows = RowWindows(max_rows=8, max_page_indices=8 * 20)
    for plan in decode_plans(page_size, rng):
        num_rows = rng.randint(plan.num_rows, 8)
        out = np.full(windows.size, POISON, np.int32)
        end = windows.pack(plan, num_rows, page_size, out)
        out[end:] = POISON
        buffer = torch.from_numpy(out)
        token_ids, _, batch, _ = build_tensors(plan, page_size, torch.device("cpu"))
        views = {name: windows.view(name, buffer, num_rows) for name in (*PLACES, "page_indptr")}
        n = plan.num_rows
        assert torch.equal(views["token_ids"][:n], token_ids)
        assert torch.equal(views["slots"][:n], torch.from_numpy(int32s(plan.slots).copy()))
        for name in ("kv_lens", "positions", "token_pages", "token_offsets"):
            assert torch.equal(views[name][:n], getattr(batch, name))
        assert torch.equal(views["page_indptr"][: n + 1], batch.page_indptr)
        assert torch.equal(
            windows.view("page_indices", buffer, n)[: len(batch.page_indices)], batch.page_indices
        )
        temperature = windows.view("temperature", buffer, num_rows).view(torch.float32)
        assert temperature[:n].tolist() == np.frombuffer(plan.samples.temperature, np.float32).tolist()
        keys = windows.view("keys", buffer, num_rows)
        assert len(keys) == 2 * num_rows
        assert len(set(keys[: 2 * n].tolist())) > n, "every draw has a key of its own"


def test_past_the_batch_nothing_is_stored_read_or_drawn() -> None:
    windows = RowWindows(max_rows=8, max_page_indices=8 * 20)
    plan = decode_plans(4, random.Random(0))[0]
    out = np.full(windows.size, POISON, np.int32)
    windows.pack(plan, 8, 4, out)
    buffer = torch.from_numpy(out)
    past = slice(plan.num_rows, None)
    assert set(windows.view("slots", buffer, 8)[past].tolist()) == {-1}
    assert set(windows.view("token_pages", buffer, 8)[past].tolist()) == {-1}
    for name in ("token_ids", "kv_lens", "positions", "token_offsets", "temperature", "top_k"):
        assert set(windows.view(name, buffer, 8)[past].tolist()) == {0}
    indptr = windows.view("page_indptr", buffer, 8)
    assert set(indptr[plan.num_rows :].tolist()) == {len(int32s(plan.page_indices))}


def test_all_padding_is_a_batch_of_nothing() -> None:
    windows = RowWindows(max_rows=4, max_page_indices=16)
    out = np.full(windows.size, POISON, np.int32)
    windows.pack_padding(4, out)
    buffer = torch.from_numpy(out)
    assert windows.view("kv_lens", buffer, 4).tolist() == [0] * 4
    assert windows.view("page_indptr", buffer, 4).tolist() == [0] * 5
    assert windows.view("slots", buffer, 4).tolist() == [-1] * 4


@pytest.mark.parametrize("most", [1, 2, 3, 7, 64, 100, 256, 1000])
def test_graph_sizes_end_in_the_largest_and_waste_little(most: int) -> None:
    sizes = graph_sizes(most)
    assert sizes == sorted(set(sizes))
    assert sizes[-1] == most
    for n in range(1, most + 1):
        size = next(size for size in sizes if size >= n)
        assert size - n <= max(3, n // 8)
    assert len(sizes) <= 50
