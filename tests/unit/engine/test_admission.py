"""What is refused, in which words, and what it takes to begin."""

import pytest

from disagg.engine.admission import checked_limits, chunk_end, limit_tokens, pages_to_begin, refuse
from disagg.errors import ConfigError
from support.engines import VOCAB, make_limits, make_request


@pytest.mark.parametrize(
    ("changes", "reason", "detail"),
    [
        ({"max_tokens": -3}, "invalid", "max_tokens must be at least 1, got -3"),
        ({"temperature": -1.0}, "invalid", "temperature"),
        ({"top_p": 0.0}, "invalid", "top_p"),
        ({"seed": 2**64}, "invalid", "seed must fit 64 bits"),
        ({"choice_index": -1}, "invalid", "choice_index"),
        ({"token_ids": ()}, "invalid", "a prompt of 0 in 0 tokens"),
        ({"num_prompt_tokens": 4}, "invalid", "a prompt of 4 in 3 tokens"),
        ({"token_ids": (1, VOCAB)}, "invalid", f"below {VOCAB}"),
        ({"token_ids": (1, -1)}, "invalid", "at least 0"),
        ({"token_ids": (1,) * 64}, "too_long", "64 tokens leave no room in a context of 64"),
        (
            {"token_ids": (1, 2, 3), "num_prompt_tokens": 1, "max_tokens": 2},
            "invalid",
            "in the replay already",
        ),
    ],
)
def test_what_can_never_run_is_refused(changes: dict, reason: str, detail: str) -> None:
    refused = refuse(make_request(**changes), make_limits())
    assert refused is not None
    assert refused.reason == reason
    assert detail in refused.detail


def test_more_kv_than_the_pool_holds_is_too_long() -> None:
    """It would wait for ever at the head of the queue."""
    limits = make_limits(num_pages=4, page_size=4)
    assert refuse(make_request(token_ids=[1] * 12, max_tokens=5), limits) is None
    refused = refuse(make_request(token_ids=[1] * 12, max_tokens=6), limits)
    assert refused is not None
    assert (refused.reason, refused.detail) == ("too_long", "17 tokens of KV never fit 4 pages")
    # A prefill worker stores none of the output.
    assert refuse(make_request(token_ids=[1] * 12, max_tokens=6, prefill_only=True), limits) is None


def test_output_ends_at_the_context() -> None:
    limits = make_limits(max_model_len=10, num_pages=100)
    assert limit_tokens(make_request(token_ids=[1] * 6, max_tokens=3), limits) == 9
    assert limit_tokens(make_request(token_ids=[1] * 6, max_tokens=300), limits) == 10
    assert limit_tokens(make_request(token_ids=[1] * 6, num_prompt_tokens=4, max_tokens=3), limits) == 7


@pytest.mark.parametrize(
    ("num_tokens", "max_tokens", "prefill_only", "pages"),
    [
        (8, 100, False, 3),  # the prompt and a page of output
        (9, 100, False, 4),
        (8, 1, False, 2),  # the only output token is never stored
        (8, 2, False, 3),
        (9, 3, False, 3),
        (9, 100, True, 3),
    ],
)
def test_pages_to_begin(num_tokens: int, max_tokens: int, prefill_only: bool, pages: int) -> None:
    request = make_request(token_ids=[1] * num_tokens, max_tokens=max_tokens, prefill_only=prefill_only)
    assert pages_to_begin(request, make_limits(page_size=4, max_model_len=1000)) == pages


@pytest.mark.parametrize(
    ("start", "num_tokens", "budget", "end"),
    [
        (0, 10, 16, 10),
        (0, 10, 10, 10),
        (0, 20, 10, 8),  # back to a page's edge
        (8, 20, 4, 12),
        (6, 20, 1, 7),  # no edge within reach
        (6, 20, 3, 8),
    ],
)
def test_chunks_end_on_a_page_where_they_can(start: int, num_tokens: int, budget: int, end: int) -> None:
    assert chunk_end(start, num_tokens, budget, page_size=4) == end


def test_every_running_sequence_must_fit_one_step() -> None:
    """Or some of them would not decode in a step that decodes the others."""
    limits = make_limits(max_num_seqs=8, max_num_batched_tokens=7)
    with pytest.raises(ConfigError, match="--max-num-batched-tokens 7 is less than --max-num-seqs 8"):
        checked_limits(limits)
    assert checked_limits(make_limits(max_num_seqs=8, max_num_batched_tokens=8))
