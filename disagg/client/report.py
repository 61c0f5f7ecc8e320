"""Figures of a load, under the names that `vllm bench serve` gives them."""

from collections.abc import Sequence
from datetime import datetime
from statistics import fmean, pstdev
from typing import Any, Final

from msgspec import Struct

from disagg.client.load import Load, Outcome

TITLES: Final = {
    "ttft": "Time to first token",
    "tpot": "Time per output token (without the first)",
    "itl": "Inter-token latency",
    "e2el": "End-to-end latency",
}


class Goals(Struct, frozen=True):
    """Milliseconds that a good answer stays within; a metric without one is not asked about."""

    limits_ms: dict[str, float] = {}

    def met_by(self, outcome: Outcome) -> bool:
        """Whether one answer was good."""
        values = {name: fmean(samples) for name, samples in _samples(outcome).items() if samples}
        return all(values.get(name, 0.0) * 1e3 <= limit for name, limit in self.limits_ms.items())


def make_report(
    load: Load,
    outcomes: Sequence[Outcome],
    *,
    request_rate: float,
    burstiness: float,
    percentiles: Sequence[float] = (50, 90, 95, 99),
    goals: Goals | None = None,
    detailed: bool = False,
) -> dict[str, Any]:
    """Summarize a load. Times whose names end in `_ms` are milliseconds, all others seconds.

    Figures are of the completed requests; the duration is from the first sent to the last ended.
    """
    completed = [outcome for outcome in outcomes if outcome.error is None]
    duration_s = _duration_s(outcomes)

    def rate(count: float) -> float:
        return count / duration_s if duration_s else 0.0

    input_tokens = sum(outcome.usage.prompt_tokens for outcome in completed if outcome.usage is not None)
    output_tokens = sum(outcome.output_tokens for outcome in completed)
    report: dict[str, Any] = {
        "date": datetime.now().strftime("%Y%m%d-%H%M%S"),
        "endpoint_type": "openai-chat" if load.kind == "chat" else "openai",
        "backend": "openai-chat" if load.kind == "chat" else "openai",
        "label": None,
        "model_id": load.model,
        "tokenizer_id": None,
        "num_prompts": len(outcomes),
        "request_rate": "inf" if request_rate == float("inf") else request_rate,
        "burstiness": burstiness,
        "max_concurrency": load.max_concurrency,
        "duration": duration_s,
        "completed": len(completed),
        "failed": len(outcomes) - len(completed),
        "total_input_tokens": input_tokens,
        "total_output_tokens": output_tokens,
        "request_throughput": rate(len(completed)),
        "request_goodput": rate(sum(map(goals.met_by, completed))) if goals else None,
        "output_throughput": rate(output_tokens),
        "total_token_throughput": rate(input_tokens + output_tokens),
        "max_concurrent_requests": _most_at_once(completed),
    }
    for name in TITLES:
        values = [value for outcome in completed for value in _samples(outcome)[name]]
        report |= _statistics(name, values, percentiles)
    return report | (_details(outcomes) if detailed else {})


def table_lines(report: dict[str, Any]) -> list[str]:
    """Put a report in a table for people, at most 80 columns wide."""
    lines = [
        _line("Completed / failed requests", f"{report['completed']} / {report['failed']}"),
        _line("Duration (s)", f"{report['duration']:.2f}"),
        _line("Prompt / output tokens", f"{report['total_input_tokens']} / {report['total_output_tokens']}"),
        _line("Requests/s", f"{report['request_throughput']:.2f}"),
        _line("Output tokens/s", f"{report['output_throughput']:.1f}"),
        _line("Prompt and output tokens/s", f"{report['total_token_throughput']:.1f}"),
    ]
    if report["request_goodput"] is not None:
        lines.append(_line("Requests/s within the goals", f"{report['request_goodput']:.2f}"))
    found = [name.removesuffix("_ttft_ms") for name in report if name.endswith("_ttft_ms")]
    heads = [head for head in found if head not in ("median", "std")]
    lines += ["", f"{'Milliseconds':<42}" + "".join(f"{head:>9}" for head in heads)]
    for name, title in TITLES.items():
        cells = [report[f"{head}_{name}_ms"] for head in heads]
        lines.append(f"{title:<42}" + "".join(f"{'-' if c is None else f'{c:.1f}':>9}" for c in cells))
    return lines


def _samples(outcome: Outcome) -> dict[str, list[float]]:
    """What one answer adds to each metric, seconds."""
    ttft_s, num_tokens = outcome.ttft_s, outcome.output_tokens
    return {
        "ttft": [] if ttft_s is None else [ttft_s],
        "tpot": [(outcome.latency_s - ttft_s) / (num_tokens - 1)]
        if ttft_s is not None and num_tokens > 1
        else [],
        "itl": outcome.itl_s,
        "e2el": [outcome.latency_s],
    }


def _statistics(name: str, values_s: list[float], percentiles: Sequence[float]) -> dict[str, float | None]:
    ordered = sorted(value * 1e3 for value in values_s)
    return {
        f"mean_{name}_ms": fmean(ordered) if ordered else None,
        f"median_{name}_ms": percentile(ordered, 50),
        f"std_{name}_ms": pstdev(ordered) if ordered else None,
        **{f"p{q:g}_{name}_ms": percentile(ordered, q) for q in percentiles},
    }


def percentile(ordered: Sequence[float], q: float) -> float | None:
    """Interpolate linearly between the closest ranks, as numpy does; None where nothing was measured."""
    if not ordered:
        return None
    position = (len(ordered) - 1) * q / 100
    below = int(position)
    above = min(below + 1, len(ordered) - 1)
    return ordered[below] + (ordered[above] - ordered[below]) * (position - below)


def _duration_s(outcomes: Sequence[Outcome]) -> float:
    ended_at = max((outcome.ended_at for outcome in outcomes), default=0.0)
    return ended_at - min((outcome.started_at for outcome in outcomes), default=0.0)


def _most_at_once(outcomes: Sequence[Outcome]) -> int:
    changes = [(outcome.started_at, 1) for outcome in outcomes]
    changes += [(outcome.ended_at, -1) for outcome in outcomes]
    running = most = 0
    for _, change in sorted(changes):
        running += change
        most = max(most, running)
    return most


def _details(outcomes: Sequence[Outcome]) -> dict[str, Any]:
    first_at = min((outcome.started_at for outcome in outcomes), default=0.0)
    return {
        "input_lens": [outcome.usage.prompt_tokens if outcome.usage else 0 for outcome in outcomes],
        "output_lens": [outcome.output_tokens for outcome in outcomes],
        "start_times": [outcome.started_at - first_at for outcome in outcomes],
        "ttfts": [outcome.ttft_s or 0.0 for outcome in outcomes],
        "itls": [outcome.itl_s for outcome in outcomes],
        "errors": [outcome.error or "" for outcome in outcomes],
    }


def _line(title: str, value: str) -> str:
    return f"{title:<42}{value:>20}"
