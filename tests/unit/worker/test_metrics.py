"""The worker's series, their names and their values."""

from prometheus_client.parser import text_string_to_metric_families

from disagg.protocol import Load
from disagg.worker.metrics import MetricLabels, StepHistogram, WorkerCounts, WorkerMetrics

LOAD = Load("ready", 2, 3, 1, 77, 10, 4, 3, 3, 0.0, 0.0)


def series(counts: WorkerCounts) -> dict[str, float]:
    """Every sample, by name and its labels beyond the common ones."""
    metrics = WorkerMetrics(
        MetricLabels("decode", "tiny", "decode-0"),
        counts,
        block_size=16,
        load=lambda: LOAD,
        malformed=lambda: 5,
    )
    samples = {}
    for family in text_string_to_metric_families(metrics.text().decode()):
        for sample in family.samples:
            labels = dict(sample.labels)
            if not sample.name.startswith("process_"):
                assert (labels.pop("role"), labels.pop("model_name"), labels.pop("pod")) == (
                    "decode",
                    "tiny",
                    "decode-0",
                )
            key = sample.name + "".join(f",{name}={value}" for name, value in sorted(labels.items()))
            samples[key] = sample.value
    return samples


def test_engine_series_have_the_names_that_dashboards_read() -> None:
    counts = WorkerCounts()
    counts.prompt_tokens, counts.generation_tokens = 100, 7
    counts.prefix_queried_tokens, counts.prefix_hit_tokens = 100, 32
    counts.finished["stop"] += 2
    counts.ttft_s.observe(0.03)
    counts.itl_s.observe(0.02)
    counts.e2e_s.observe(0.4)
    got = series(counts)
    assert got["vllm:num_requests_running"] == 2
    assert got["vllm:num_requests_waiting"] == 3
    assert got["vllm:kv_cache_usage_perc"] == 0.3
    assert got["vllm:cache_config_info,block_size=16,num_gpu_blocks=10"] == 1
    assert got["vllm:prompt_tokens_total"] == 100
    assert got["vllm:generation_tokens_total"] == 7
    assert got["vllm:prefix_cache_queries_total"] == 100
    assert got["vllm:prefix_cache_hits_total"] == 32
    assert got["vllm:request_success_total,finished_reason=stop"] == 2
    assert got["vllm:time_to_first_token_seconds_bucket,le=0.02"] == 0
    assert got["vllm:time_to_first_token_seconds_bucket,le=0.04"] == 1
    assert got["vllm:inter_token_latency_seconds_count"] == 1
    assert got["vllm:e2e_request_latency_seconds_sum"] == 0.4


def test_pages_balance_in_our_series() -> None:
    got = series(WorkerCounts())
    pages = [got[f"disagg_worker_pages,state={state}"] for state in ("free", "cached", "in_use")]
    assert pages == [4, 3, 3]
    assert got["disagg_worker_malformed_messages_total"] == 5
    assert got["disagg_worker_queued_tokens"] == 77


def test_a_value_on_a_bound_belongs_to_that_bucket() -> None:
    """Prometheus' buckets are `le`: less or equal."""
    histogram = StepHistogram((1.0, 2.0))
    for value in (1.0, 1.5, 9.0):
        histogram.observe(value)
    assert histogram.buckets() == [("1.0", 1.0), ("2.0", 2.0), ("+Inf", 3.0)]
    assert histogram.sum == 11.5
