"""What the host does for a step of many decodes, counted: the device waits for it where it is slow."""

import sys
from types import FrameType
from typing import Any

from disagg.engine.engine import Engine
from support.engines import make_engine, make_request

PAGE_SIZE = 16


class OneToken:
    """Says the same whatever it is asked, one step late."""

    depth = 1

    def launch(self, plan: Any) -> Any:
        return lambda: [5] * plan.num_samples


def decoding_engine(num_seqs: int) -> Engine:
    engine = make_engine(
        20 * num_seqs,
        PAGE_SIZE,
        runner=OneToken(),
        max_num_seqs=num_seqs,
        max_num_batched_tokens=64 * num_seqs,
        max_model_len=300,
    )
    for i in range(num_seqs):
        # Of as many lengths as a page has tokens, so that as many pages fill in each step.
        prompt = [j % 3 for j in range(33 + i % PAGE_SIZE)]
        engine.add(make_request(f"{i}", prompt, max_tokens=200, ignore_eos=True, cache_salt=f"{i}"))
    for _ in range(PAGE_SIZE):
        engine.step()
    return engine


def bytecodes_a_step(engine: Engine) -> float:
    """Python's instructions, averaged over the steps in which every sequence fills one page."""
    counted = 0

    def trace(frame: FrameType, event: str, arg: object) -> Any:
        nonlocal counted
        frame.f_trace_opcodes, frame.f_trace_lines = True, False
        counted += event == "opcode"
        return trace

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        for _ in range(PAGE_SIZE):
            engine.step()
    finally:
        sys.settrace(before)
    return counted / PAGE_SIZE


def test_a_decode_costs_the_host_a_few_instructions() -> None:
    """A loop of Python over the batch takes a millisecond, and a GPU's step but a few."""
    few, many = bytecodes_a_step(decoding_engine(64)), bytecodes_a_step(decoding_engine(256))
    assert (many - few) / (256 - 64) < 50
    assert many < 15_000
