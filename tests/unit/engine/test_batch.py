"""Where each token of a step stands in its sequence and in the pool."""

import random

import torch

from disagg.engine.batch import build_tensors
from disagg.engine.plan import int32s
from support.engines import make_request, make_scheduler
from support.fake_runner import FakeRunner

CPU = torch.device("cpu")
PAGE_SIZE = 4


def test_a_mixed_step() -> None:
    scheduler = make_scheduler(num_pages=32, page_size=PAGE_SIZE, max_num_batched_tokens=12, max_num_seqs=4)
    runner = FakeRunner(32, PAGE_SIZE, 11)
    scheduler.add(make_request("a", range(5), max_tokens=9, ignore_eos=True))
    plan = scheduler.plan()
    scheduler.retire(plan, runner.run(plan))
    scheduler.add(make_request("b", range(10), max_tokens=9, cache_salt="b"))
    scheduler.add(make_request("c", range(9), max_tokens=9, cache_salt="c"))
    plan = scheduler.plan()
    token_ids, logits_at, batch, _ = build_tensors(plan, PAGE_SIZE, CPU)
    assert batch.num_decodes == 1
    assert batch.qo_indptr.tolist() == [0, 1, 11, 12]
    assert batch.kv_lens.tolist() == [6, 10, 1]
    assert batch.page_indptr.tolist() == [0, 2, 5, 6]
    assert batch.positions.tolist() == [5, *range(10), 0]
    assert token_ids.tolist()[1:] == [*range(10), 0]
    assert logits_at.tolist() == [0, 10]
    assert logits_at.dtype == torch.int64
    assert (batch.max_qo_len, batch.max_kv_len) == (10, 10)


def test_every_token_lands_where_its_page_table_says() -> None:
    rng = random.Random(0)
    for _ in range(50):
        page_size = rng.randint(1, 5)
        scheduler = make_scheduler(40, page_size, max_num_batched_tokens=rng.randint(4, 20))
        runner = FakeRunner(40, page_size, 11)
        for i in range(4):
            prompt = [rng.randint(0, 10) for _ in range(rng.randint(1, 9))]
            scheduler.add(make_request(f"r{i}", prompt, max_tokens=5))
        while (plan := scheduler.plan()) is not None:
            token_ids, logits_at, batch, _ = build_tensors(plan, page_size, CPU)
            assert batch.num_sequences == plan.num_rows
            row = 0
            for token in range(plan.num_tokens):
                while token >= batch.qo_indptr[row + 1]:
                    row += 1
                place = token - int(batch.qo_indptr[row])
                position = int(batch.kv_lens[row] - (batch.qo_indptr[row + 1] - batch.qo_indptr[row])) + place
                pages = batch.page_indices[batch.page_indptr[row] : batch.page_indptr[row + 1]].tolist()
                assert batch.positions[token] == position
                assert batch.token_pages[token] == pages[position // page_size]
                assert batch.token_offsets[token] == position % page_size
            last = [int(batch.qo_indptr[r + 1]) - 1 for r in int32s(plan.samples.rows).tolist()]
            assert logits_at.tolist() == last
            assert all(t.dtype == torch.int32 for t in (token_ids, batch.positions, batch.page_indices))
            scheduler.retire(plan, runner.run(plan))
