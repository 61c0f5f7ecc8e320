"""The offline benchmark: what `disagg bench offline` runs and how it is summed up."""

import random
import statistics
import time
from collections.abc import Callable
from datetime import UTC, datetime
from typing import Any

from msgspec import Struct

from disagg.client.report import percentile
from disagg.llm import LLM
from disagg.protocol import SamplingParams

Work = list[tuple[list[int], SamplingParams]]

PERCENTILES = (50, 90, 95, 99)


class Workload(Struct, frozen=True, kw_only=True):
    """Random requests. Lengths are uniform, both bounds included."""

    num_prompts: int
    input_len: tuple[int, int]
    output_len: tuple[int, int]
    temperature: float
    seed: int


class Timing(Struct, frozen=True):
    """One request, in seconds since the start of all."""

    num_input_tokens: int
    token_times: list[float]


class Run(Struct, frozen=True):
    """A measured run."""

    duration_s: float
    timings: list[Timing]


def make_work(workload: Workload, vocab_size: int) -> Work:
    """Draw the requests; the same for equal workloads and vocabularies."""
    draw = random.Random(workload.seed)
    work = []
    for index in range(workload.num_prompts):
        prompt = [draw.randrange(vocab_size) for _ in range(draw.randint(*workload.input_len))]
        sampling = SamplingParams(
            max_tokens=draw.randint(*workload.output_len),
            temperature=workload.temperature,
            seed=workload.seed,
            choice_index=index,
            ignore_eos=True,
        )
        work.append((prompt, sampling))
    return work


def measure(llm: LLM, work: Work, on_tokens: Callable[[int, float], None]) -> Run:
    """Run the requests, all at once; `on_tokens` is told (output tokens so far, seconds)."""
    times: list[list[float]] = [[] for _ in work]
    num_tokens = 0
    started_at = time.monotonic()
    for progress in llm.run(work):
        elapsed_s = time.monotonic() - started_at
        times[progress.index] += [elapsed_s] * len(progress.token_ids)
        num_tokens += len(progress.token_ids)
        on_tokens(num_tokens, elapsed_s)
    duration_s = time.monotonic() - started_at
    return Run(duration_s, [Timing(len(work[i][0]), token_times) for i, token_times in enumerate(times)])


def figures(model: str, run: Run) -> dict[str, Any]:
    """Sum up a run under the field names of `vllm bench serve` and `vllm bench throughput`."""
    num_input = sum(timing.num_input_tokens for timing in run.timings)
    num_output = sum(len(timing.token_times) for timing in run.timings)
    itls = [[b - a for a, b in zip(t.token_times, t.token_times[1:], strict=False)] for t in run.timings]
    result: dict[str, Any] = {
        "date": datetime.now(UTC).strftime("%Y%m%d-%H%M%S"),
        "backend": "disagg-offline",
        "model_id": model,
        "num_prompts": len(run.timings),
        "request_rate": "inf",
        "duration": run.duration_s,
        "completed": len(run.timings),
        "failed": 0,
        "total_input_tokens": num_input,
        "total_output_tokens": num_output,
        "request_throughput": len(run.timings) / run.duration_s,
        "output_throughput": num_output / run.duration_s,
        "total_token_throughput": (num_input + num_output) / run.duration_s,
        "elapsed_time": run.duration_s,
        "num_requests": len(run.timings),
        "total_num_tokens": num_input + num_output,
        "requests_per_second": len(run.timings) / run.duration_s,
        "tokens_per_second": (num_input + num_output) / run.duration_s,
    }
    result |= _quantiles("ttft", [timing.token_times[0] for timing in run.timings])
    result |= _quantiles("tpot", [statistics.fmean(gaps) for gaps in itls if gaps])
    result |= _quantiles("itl", [gap for gaps in itls for gap in gaps])
    result |= _quantiles("e2el", [timing.token_times[-1] for timing in run.timings])
    result |= {
        "input_lens": [timing.num_input_tokens for timing in run.timings],
        "output_lens": [len(timing.token_times) for timing in run.timings],
        "ttfts": [timing.token_times[0] for timing in run.timings],
        "itls": itls,
    }
    return result


def _quantiles(name: str, seconds: list[float]) -> dict[str, float | None]:
    """Mean, median, deviation and percentiles of some durations, in milliseconds; 0 where there are none."""
    ms = sorted(1000 * s for s in seconds) or [0.0]
    found: dict[str, float | None] = {
        f"mean_{name}_ms": statistics.fmean(ms),
        f"median_{name}_ms": statistics.median(ms),
        f"std_{name}_ms": statistics.pstdev(ms),
    }
    return found | {f"p{q}_{name}_ms": percentile(ms, q) for q in PERCENTILES}
