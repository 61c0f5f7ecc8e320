"""Figures of a load."""

import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from disagg.client import Goals, Load, Outcome, make_report, table_lines
from disagg.client.report import percentile
from disagg.client.server import Usage

LOAD = Load(url="http://test", model="m", max_concurrency=2)
OUTCOMES = [
    # 3 tokens in 3 events: first after 0.1 s, then 0.1 and 0.2 s, the end at once
    Outcome(10.0, 10.4, [10.1, 10.2, 10.4], Usage(5, 3)),
    # 5 tokens in 2 events
    Outcome(10.2, 11.0, [10.5, 11.0], Usage(7, 5)),
    Outcome(10.3, 10.35, [], None, "no worker"),
]


def report(**options: object) -> dict[str, object]:
    return make_report(LOAD, OUTCOMES, request_rate=float("inf"), burstiness=1.0, **options)  # type: ignore[arg-type]


def test_figures_are_of_what_completed() -> None:
    figures = report()
    assert figures["num_prompts"] == 3
    assert (figures["completed"], figures["failed"]) == (2, 1)
    assert figures["duration"] == pytest.approx(1.0)
    assert (figures["total_input_tokens"], figures["total_output_tokens"]) == (12, 8)
    assert figures["request_throughput"] == pytest.approx(2.0)
    assert figures["output_throughput"] == pytest.approx(8.0)
    assert figures["total_token_throughput"] == pytest.approx(20.0)
    assert figures["max_concurrent_requests"] == 2
    assert figures["mean_ttft_ms"] == pytest.approx(200.0)
    assert figures["mean_tpot_ms"] == pytest.approx((150 + 125) / 2)
    assert figures["median_itl_ms"] == pytest.approx(200.0)
    assert figures["mean_e2el_ms"] == pytest.approx(600.0)
    assert figures["p99_e2el_ms"] == pytest.approx(796.0)
    assert figures["request_rate"] == "inf"


def test_names_are_those_of_vllm() -> None:
    """Scripts that read its files read ours."""
    expected = {
        "date", "endpoint_type", "backend", "label", "model_id", "tokenizer_id", "num_prompts",
        "request_rate", "burstiness", "max_concurrency", "duration", "completed", "failed",
        "total_input_tokens", "total_output_tokens", "request_throughput", "request_goodput",
        "output_throughput", "total_token_throughput", "max_concurrent_requests",
    }  # fmt: skip
    for name in ("ttft", "tpot", "itl", "e2el"):
        expected |= {f"{kind}_{name}_ms" for kind in ("mean", "median", "std", "p50", "p99.9")}
    assert set(report(percentiles=(50, 99.9))) == expected
    detailed = set(report(percentiles=(50, 99.9), detailed=True))
    assert detailed - expected == {"input_lens", "output_lens", "start_times", "ttfts", "itls", "errors"}


def test_a_report_is_json_even_of_nothing() -> None:
    for outcomes in ([], OUTCOMES[2:]):
        figures = make_report(LOAD, outcomes, request_rate=1.0, burstiness=1.0, detailed=True)
        assert figures["mean_ttft_ms"] is None
        json.dumps(figures, allow_nan=False)
        table_lines(figures)


@pytest.mark.parametrize(
    ("limits", "good"),
    [
        ({"ttft": 150}, 1),
        ({"ttft": 300.001}, 2),
        ({"ttft": 300.001, "tpot": 130}, 1),
        ({"e2el": 100}, 0),
    ],
)
def test_goodput_counts_what_is_within_every_goal(limits: dict[str, float], good: int) -> None:
    assert report(goals=Goals(limits))["request_goodput"] == pytest.approx(good)


def test_the_table_fits_80_columns() -> None:
    lines = table_lines(report(percentiles=(50, 90, 99)))
    assert max(map(len, lines)) <= 80
    assert any("Inter-token latency" in line for line in lines)


@settings(deadline=None)  # numpy loads this part when it is first called
@given(st.lists(st.floats(0, 1e6), min_size=1, max_size=50), st.floats(0, 100))
def test_percentiles_are_numpys(values: list[float], q: float) -> None:
    assert percentile(sorted(values), q) == pytest.approx(np.percentile(values, q))
