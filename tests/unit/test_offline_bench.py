"""What the offline benchmark runs, and how it is summed up."""

import numpy as np
import pytest

from disagg.offline_bench import Run, Timing, Workload, figures, make_work

WORKLOAD = Workload(num_prompts=40, input_len=(3, 5), output_len=(1, 2), temperature=0.5, seed=0)


def test_the_work_is_the_same_for_equal_seeds() -> None:
    assert make_work(WORKLOAD, 100) == make_work(WORKLOAD, 100)
    other = Workload(num_prompts=40, input_len=(3, 5), output_len=(1, 2), temperature=0.5, seed=1)
    assert make_work(WORKLOAD, 100) != make_work(other, 100)


def test_lengths_cover_both_bounds() -> None:
    work = make_work(WORKLOAD, 100)
    assert {len(prompt) for prompt, _ in work} == {3, 4, 5}
    assert {sampling.max_tokens for _, sampling in work} == {1, 2}
    assert all(0 <= token < 100 for prompt, _ in work for token in prompt)
    assert all(sampling.ignore_eos and sampling.temperature == 0.5 for _, sampling in work)
    assert len({sampling.choice_index for _, sampling in work}) == 40


def test_figures_are_what_numpy_says() -> None:
    times = [[0.5, 0.7, 1.1], [0.25], [1.0, 2.0]]
    result = figures("m", Run(4.0, [Timing(10, t) for t in times]))
    gaps = np.array([0.2, 0.4, 1.0]) * 1000
    assert result["total_input_tokens"] == 30
    assert result["total_output_tokens"] == 6
    assert result["output_throughput"] == 1.5
    assert result["total_token_throughput"] == 9.0
    assert result["mean_itl_ms"] == pytest.approx(gaps.mean())
    assert result["std_itl_ms"] == pytest.approx(gaps.std())
    for percentile in (50, 90, 95, 99):
        assert result[f"p{percentile}_itl_ms"] == pytest.approx(np.percentile(gaps, percentile))
    assert result["median_ttft_ms"] == 500
    assert result["mean_tpot_ms"] == pytest.approx((300 + 1000) / 2)
    assert result["p99_e2el_ms"] == pytest.approx(np.percentile([1100, 250, 2000], 99))
    assert result["ttfts"] == [0.5, 0.25, 1.0]


def test_a_single_token_has_no_gaps() -> None:
    result = figures("m", Run(1.0, [Timing(1, [0.5])]))
    assert (result["mean_itl_ms"], result["p99_tpot_ms"]) == (0, 0)
