"""How the CPU benchmarks time a call."""

from collections.abc import Callable, Sequence
from time import perf_counter
from typing import TypeVar

T = TypeVar("T")


def best_of_rounds(run: Callable[[T], object], operands: Sequence[T], rounds: int) -> float:
    """Median over the operands of each one's best, in microseconds: what the machine does undisturbed."""
    best = [float("inf")] * len(operands)
    for _ in range(rounds):
        for i, operand in enumerate(operands):
            began = perf_counter()
            run(operand)
            best[i] = min(best[i], perf_counter() - began)
    return sorted(best)[len(best) // 2] * 1e6
