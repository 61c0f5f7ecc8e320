"""Requests that no engine can run are refused by name; the engine and its other requests go on.

https://github.com/vllm-project/vllm/issues/7283: an empty prompt ended the background loop, and with it
the server. https://github.com/vllm-project/vllm/issues/6521: `max_tokens` of 0 did.
"""

import math

import pytest

from disagg.engine import Refused
from support.engines import VOCAB, make_engine, make_request, run_all

BAD = [
    {"token_ids": ()},
    {"token_ids": (), "num_prompt_tokens": 0, "prefill_only": True},
    {"max_tokens": 0},
    {"max_tokens": -3},
    {"max_tokens": -(2**63)},
    {"temperature": -0.1},
    {"temperature": math.nan},
    {"temperature": math.inf},
    {"top_p": 0.0},
    {"top_p": math.nan},
    {"top_k": -1},
    {"min_p": 1.5},
    {"seed": -1},
    {"seed": 2**64},
    {"choice_index": 2**31},
    {"token_ids": (VOCAB,)},
    {"token_ids": (-1,)},
    {"token_ids": (2**40,)},
    {"num_prompt_tokens": 0},
    {"num_prompt_tokens": -1},
    {"num_prompt_tokens": 9},
]


@pytest.mark.parametrize("bad", BAD, ids=str)
def test_it_is_refused_and_leaves_nothing(bad: dict) -> None:
    engine = make_engine()
    engine.add(make_request("good", (1, 2, 3), max_tokens=5, ignore_eos=True))
    engine.step()
    for ask in (engine.add, lambda request: engine.reserve(request, False)):
        refused = ask(make_request("bad", **bad))
        assert isinstance(refused, Refused)
        assert refused.reason == "invalid"
        assert refused.detail
    assert len(run_all(engine)[0]["good"]) == 4
    stats = engine.stats()
    assert (stats.pages_in_use, stats.waiting, stats.reserved) == (0, 0, 0)


@pytest.mark.parametrize(
    "extreme",
    [{"max_tokens": 2**62}, {"top_k": 2**31 - 1}, {"top_k": 2**40}, {"stop_token_ids": (2**40, -1)}],
    ids=str,
)
def test_what_is_merely_extreme_runs(extreme: dict) -> None:
    engine = make_engine()
    engine.add(make_request("a", (1, 2, 3), **{"max_tokens": 5, **extreme}))
    assert run_all(engine)[1][-1].finish_reason in ("length", "stop")
    assert engine.stats().pages_in_use == 0
