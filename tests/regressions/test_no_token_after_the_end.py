"""A step planned before the end token was known puts out nothing.

With steps planned ahead, the step after the one that samples the end is under way already.
https://github.com/vllm-project/vllm/pull/23569 and its kind have to drop what it samples; where they
did not, clients saw text after the end.
"""

import pytest

from support.engines import VOCAB, make_request, make_scheduler
from support.fake_runner import FakeRunner, expected_token


def output_of(eos: int, depth: int, **sampling: object) -> tuple[list[int], list[str], int]:
    scheduler = make_scheduler(num_pages=32, eos=(eos,), max_num_seqs=2)
    runner = FakeRunner(32, 4, VOCAB)
    scheduler.add(make_request("a", [1, 2, 3], **{"max_tokens": 30, **sampling}))
    flights, events = [], []
    while (plan := scheduler.plan()) is not None or flights:
        flights += [plan] if plan is not None else []
        while flights and (len(flights) >= depth or plan is None):
            oldest = flights.pop(0)
            events += scheduler.retire(oldest, runner.run(oldest))
            scheduler.audit()
            plan = plan if len(flights) >= depth else None
            if plan is None:
                break
    assert scheduler._cache.num_in_use == 0
    tokens = [token for event in events for token in event.token_ids]
    return tokens, [e.finish_reason for e in events if e.finish_reason], len(runner.plans)


@pytest.mark.parametrize("depth", [1, 2, 3])
def test_the_end_token_is_the_last_one(depth: int) -> None:
    tokens = [1, 2, 3]
    for _ in range(5):
        tokens.append(expected_token(tokens, VOCAB))
    end = tokens[7]
    expected = tokens[3 : tokens.index(end, 3) + 1]
    output, reasons, num_steps = output_of(end, depth)
    assert (output, reasons) == (expected, ["stop"])
    assert num_steps == len(expected) + depth - 1, "steps were planned ahead"


@pytest.mark.parametrize("depth", [1, 2, 3])
def test_no_step_is_planned_past_max_tokens(depth: int) -> None:
    output, reasons, num_steps = output_of(99, depth, max_tokens=4)
    assert (len(output), reasons, num_steps) == (4, ["length"], 4)
