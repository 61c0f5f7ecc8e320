"""Every running sequence gets a token in every step, however many prompts arrive.

https://github.com/sgl-project/sglang/issues/32549: prompts always went first, and under a steady stream
of them running requests waited 24 seconds for a token. Older engines did so for one step of each prompt
(https://github.com/GeeeekExplorer/nano-vllm/issues/73).
"""

import pytest

from disagg.engine import SequenceOutput
from support.engines import make_engine, make_request


@pytest.mark.parametrize("budget", [4, 8, 16])
def test_a_token_in_every_step_under_a_stream_of_prompts(budget: int) -> None:
    engine = make_engine(num_pages=200, max_num_seqs=4, max_num_batched_tokens=budget, max_model_len=200)
    for name in "ab":
        engine.add(make_request(name, [1, 2], max_tokens=60, ignore_eos=True))
    engine.step()
    got = {"a": 1, "b": 1}
    num_prompt_tokens = 0
    for i in range(50):
        engine.add(make_request(f"p{i}", [i % 11] * 40, max_tokens=1, cache_salt=str(i)))
        step = engine.step()
        assert step is not None
        assert step.num_prefill_tokens + step.num_decode_tokens <= budget
        num_prompt_tokens += step.num_prefill_tokens
        for event in step.events:
            if isinstance(event, SequenceOutput) and event.request_id in got:
                got[event.request_id] += len(event.token_ids)
    assert got == {"a": 51, "b": 51}
    # Nor the other way round: prompts get all that decodes leave, down to a page's edge.
    assert num_prompt_tokens >= 50 * (budget - 2) // 2


def test_a_prompt_is_not_starved_by_decodes() -> None:
    """The budget exceeds the slots by one here, so that is what the prompt gets."""
    engine = make_engine(num_pages=64, max_num_seqs=4, max_num_batched_tokens=4, max_model_len=60)
    for name in "abc":
        engine.add(make_request(name, [1], max_tokens=40, ignore_eos=True))
    engine.step()
    engine.add(make_request("p", [2] * 10, max_tokens=2, ignore_eos=True))
    for _ in range(11):
        step = engine.step()
    assert any(event.request_id == "p" for event in step.events)
