"""A request that can never fit is refused at once, not left at the head of the queue for ever.

https://github.com/vllm-project/vllm/pull/39828, https://github.com/vllm-project/vllm/pull/56028: it was
admitted, never scheduled, and every request behind it stopped as well.
"""

import pytest

from disagg.engine import Added, Refused
from support.engines import make_engine, make_request, run_all


@pytest.mark.parametrize(
    ("num_tokens", "max_tokens", "fits"),
    [
        (31, 1, True),  # a pool of 8 pages of 4
        (32, 1, True),
        (33, 1, False),
        (30, 3, True),
        (30, 4, False),
        (40, 1, False),
    ],
)
def test_what_the_pool_cannot_hold_is_refused_and_the_rest_runs(
    num_tokens: int, max_tokens: int, fits: bool
) -> None:
    engine = make_engine(num_pages=8, max_model_len=40)
    answer = engine.add(make_request("a", [1] * num_tokens, max_tokens=max_tokens, ignore_eos=True))
    assert isinstance(answer, Added if fits else Refused)
    if not fits:
        assert answer.reason == "too_long"
    engine.add(make_request("b", [2], max_tokens=2, ignore_eos=True))
    outputs, _ = run_all(engine)
    assert len(outputs.get("a", [])) == (max_tokens if fits else 0)
    assert len(outputs["b"]) == 2


def test_a_sequence_as_long_as_the_pool_ends_among_others() -> None:
    """Alone it fits, so it must end; others are handed back for it or wait."""
    engine = make_engine(num_pages=8, max_model_len=40)
    engine.add(make_request("long", [1] * 5, max_tokens=28, ignore_eos=True))
    for i in range(6):
        engine.add(make_request(f"s{i}", [2, i], max_tokens=20, ignore_eos=True))
    outputs, events = run_all(engine)
    assert len(outputs["long"]) == 28
    ends = {e.request_id: e.finish_reason for e in events if e.finish_reason}
    assert ends["long"] == "length"
    assert set(ends) == {"long", *(f"s{i}" for i in range(6))}
