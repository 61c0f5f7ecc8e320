"""What is asked, and when."""

from itertools import pairwise
from statistics import fmean, pstdev

import pytest

from disagg.client import Workload, plan_arrivals, plan_prompts
from disagg.client.workload import WORDS


def test_the_same_workload_is_the_same_prompts() -> None:
    workload = Workload(num_prompts=20, range_ratio=0.5, shared_prefix_share=0.5)
    assert plan_prompts(workload) == plan_prompts(workload)
    other = Workload(num_prompts=20, range_ratio=0.5, shared_prefix_share=0.5, seed=1)
    assert plan_prompts(workload) != plan_prompts(other)


def test_lengths() -> None:
    prompts = plan_prompts(Workload(num_prompts=500, input_len=100, output_len=10, range_ratio=0.5))
    lengths = [len(prompt.text.split()) for prompt in prompts]
    assert (min(lengths), max(lengths)) == (50, 150)
    assert {prompt.max_tokens for prompt in prompts} == set(range(5, 16))
    exact = plan_prompts(Workload(num_prompts=5, input_len=7, output_len=3))
    assert {(len(prompt.text.split()), prompt.max_tokens) for prompt in exact} == {(7, 3)}


def test_a_length_is_never_zero() -> None:
    prompts = plan_prompts(Workload(num_prompts=50, input_len=1, output_len=1, range_ratio=1.0))
    assert all(prompt.text and prompt.max_tokens >= 1 for prompt in prompts)


def common_words(one: str, other: str) -> int:
    pairs = zip(one.split(), other.split(), strict=False)
    return next((index for index, (a, b) in enumerate(pairs) if a != b), min(len(one), len(other)))


@pytest.mark.parametrize("num_prefixes", [1, 3])
def test_the_shared_share_of_a_prompt_is_shared(num_prefixes: int) -> None:
    prompts = plan_prompts(
        Workload(num_prompts=12, input_len=200, shared_prefix_share=0.75, num_prefixes=num_prefixes)
    )
    for index, prompt in enumerate(prompts):
        for other_index, other in enumerate(prompts[:index]):
            common = common_words(prompt.text, other.text)
            if index % num_prefixes == other_index % num_prefixes:
                assert 150 <= common < 160
            else:
                assert common < 10


def test_without_a_share_nothing_is_shared() -> None:
    prompts = plan_prompts(Workload(num_prompts=10))
    assert all(common_words(a.text, b.text) < 10 for a in prompts for b in prompts if a is not b)


def test_words_are_plain_and_different() -> None:
    assert len(set(WORDS)) == len(WORDS) > 100
    assert all(word.isalpha() and word.islower() and word.isascii() for word in WORDS)


@pytest.mark.parametrize("burstiness", [0.3, 1.0, 10.0])
def test_arrivals_have_the_rate_and_the_burstiness(burstiness: float) -> None:
    arrivals = plan_arrivals(4001, 20.0, burstiness, seed=0)
    assert arrivals[0] == 0.0
    assert arrivals == sorted(arrivals)
    assert arrivals[-1] == pytest.approx(200.0)
    gaps = [after - before for before, after in pairwise(arrivals)]
    # the coefficient of variation of a gamma distribution
    assert pstdev(gaps) / fmean(gaps) == pytest.approx(burstiness**-0.5, rel=0.1)


def test_an_infinite_rate_sends_all_at_once() -> None:
    assert plan_arrivals(3, float("inf"), 1.0, seed=0) == [0.0, 0.0, 0.0]
    assert plan_arrivals(1, 5.0, 1.0, seed=0) == [0.0]
