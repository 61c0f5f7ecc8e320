"""Equal prompts computed side by side: the second keeps no row on pages that were given back.

https://github.com/sgl-project/mini-sglang/pull/142: the duplicate's pages were freed while its page
table still pointed at them, so its decodes read whatever the next request wrote there.
"""

import pytest

from disagg.engine.plan import int32s
from support.engines import VOCAB, make_engine, make_request, run_all
from support.fake_runner import FakeRunner, expected_token

PROMPT = [1, 2, 3, 4, 5, 6, 7, 8, 9]


def greedy(prompt: list[int], n: int) -> list[int]:
    tokens = list(prompt)
    while len(tokens) < len(prompt) + n:
        tokens.append(expected_token(tokens, VOCAB))
    return tokens[len(prompt) :]


def test_rows_of_duplicates_show_the_cached_pages_from_the_next_step_on() -> None:
    runner = FakeRunner(16, 4, VOCAB)
    engine = make_engine(runner=runner, max_num_batched_tokens=32)
    for name in "ab":
        engine.add(make_request(name, PROMPT, max_tokens=6, ignore_eos=True))
    engine.step()
    # The second one's two full pages duplicated the first one's and are free again.
    assert engine.stats().pages_free == 16 - 2 * 2 - 2
    engine.step()
    plan = runner.plans[-1]
    indptr, pages = int32s(plan.page_indptr).tolist(), int32s(plan.page_indices).tolist()
    a, b = pages[indptr[0] : indptr[1]], pages[indptr[1] : indptr[2]]
    assert a[:2] == b[:2]
    assert a[2] != b[2], "the pages they write to are their own"


@pytest.mark.parametrize("copies", [2, 4])
def test_duplicates_read_their_own_kv_while_others_reuse_the_freed_pages(copies: int) -> None:
    """Every token of the fake model depends on all KV before it."""
    engine = make_engine(num_pages=24, max_num_batched_tokens=64, max_num_seqs=8)
    for i in range(copies):
        engine.add(make_request(f"same{i}", PROMPT, max_tokens=8, ignore_eos=True))
    engine.step()
    for i in range(8 - copies):
        engine.add(make_request(f"other{i}", [i, 10, i, 9], max_tokens=5, ignore_eos=True, cache_salt=str(i)))
    outputs, _ = run_all(engine)
    first = expected_token(PROMPT, VOCAB)
    for i in range(copies):
        assert [first, *outputs[f"same{i}"]] == greedy(PROMPT, 8)
    assert engine.stats().pages_in_use == 0
    engine.audit()
