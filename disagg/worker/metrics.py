"""A worker's Prometheus series: engine-side ones under vLLM's names, ours under `disagg_worker_`.

The engine thread writes plain numbers and lists into `WorkerCounts`, which costs it a few tenths
of a microsecond an observation; they become series when someone scrapes. A scrape on another
thread may see a step half counted, never a torn number.
"""

from bisect import bisect_left
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from itertools import accumulate

from msgspec import Struct
from prometheus_client import CollectorRegistry, ProcessCollector, generate_latest
from prometheus_client.core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    HistogramMetricFamily,
    InfoMetricFamily,
)
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector

from disagg.engine import EngineStats
from disagg.protocol import Load

# vLLM's bounds, so that dashboards' quantiles are comparable.
TTFT_BOUNDS_S = (
    0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0, 20.0, 40.0,
    80.0, 160.0, 640.0, 2560.0,
)  # fmt: skip
ITL_BOUNDS_S = (
    0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0, 20.0, 40.0, 80.0,
)  # fmt: skip
E2E_BOUNDS_S = (
    0.3, 0.5, 0.8, 1.0, 1.5, 2.0, 2.5, 5.0, 10.0, 15.0, 20.0, 30.0, 40.0, 50.0, 60.0, 120.0, 240.0, 480.0,
    960.0, 1920.0, 7680.0,
)  # fmt: skip
STEP_BOUNDS_S = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0)


class StepHistogram:
    """A histogram with one writer and no lock."""

    def __init__(self, bounds: Sequence[float]) -> None:
        self._bounds = tuple(bounds)
        self._counts = [0] * (len(bounds) + 1)
        self._sum = 0.0

    def observe(self, value: float) -> None:
        """Count `value`; a bound belongs to the bucket below it."""
        self._counts[bisect_left(self._bounds, value)] += 1
        self._sum += value

    def buckets(self) -> list[tuple[str, float]]:
        """Cumulative counts by upper bound, `+Inf` last."""
        names = [str(bound) for bound in self._bounds] + ["+Inf"]
        return list(zip(names, (float(n) for n in accumulate(self._counts)), strict=True))

    @property
    def sum(self) -> float:
        """Sum of what was observed."""
        return self._sum


class WorkerCounts:
    """What the engine thread counts."""

    def __init__(self) -> None:
        self.prompt_tokens = 0
        self.generation_tokens = 0
        self.prefix_queried_tokens = 0
        self.prefix_hit_tokens = 0
        self.finished: Counter[str] = Counter()
        self.ttft_s = StepHistogram(TTFT_BOUNDS_S)
        self.itl_s = StepHistogram(ITL_BOUNDS_S)
        self.e2e_s = StepHistogram(E2E_BOUNDS_S)
        self.step_s = StepHistogram(STEP_BOUNDS_S)
        self.sent_bytes = 0
        self.received_bytes = 0
        self.transfer_failures: Counter[str] = Counter()
        self.stale_messages = 0
        self.leases: dict[str, int] = {}
        """Attempts held now, by state."""
        self.quarantined_pages = 0

    def take(self, stats: EngineStats) -> None:
        """Copy the engine's own totals."""
        self.prompt_tokens = stats.num_prompt_tokens
        self.generation_tokens = stats.num_output_tokens
        self.prefix_queried_tokens = stats.num_prompt_tokens
        self.prefix_hit_tokens = stats.num_cached_tokens
        self.quarantined_pages = stats.pages_quarantined


class MetricLabels(Struct, frozen=True):
    """Labels of every series."""

    role: str
    model_name: str
    pod: str


class WorkerMetrics:
    """The registry of one worker, and its text."""

    def __init__(
        self,
        labels: MetricLabels,
        counts: WorkerCounts,
        *,
        block_size: int,
        load: Callable[[], Load],
        malformed: Callable[[], int],
    ) -> None:
        self._registry = CollectorRegistry()
        self._registry.register(_WorkerCollector(labels, counts, block_size, load, malformed))
        ProcessCollector(registry=self._registry)

    def text(self) -> bytes:
        """All series in Prometheus' text format."""
        return generate_latest(self._registry)


class _WorkerCollector(Collector):
    def __init__(
        self,
        labels: MetricLabels,
        counts: WorkerCounts,
        block_size: int,
        load: Callable[[], Load],
        malformed: Callable[[], int],
    ) -> None:
        self._names = ["role", "model_name", "pod"]
        self._values = [labels.role, labels.model_name, labels.pod]
        self._counts = counts
        self._block_size = block_size
        self._load = load
        self._malformed = malformed

    def describe(self) -> list[Metric]:
        return []  # so that registering does not collect

    def collect(self) -> Iterator[Metric]:
        load = self._load()
        yield from self._engine_gauges(load)
        yield from self._engine_counters()
        yield from self._histograms()
        yield from self._our_gauges(load)
        yield from self._our_counters()

    def _engine_gauges(self, load: Load) -> Iterator[Metric]:
        yield self._gauge("vllm:num_requests_running", "Sequences in the running batch.", load.running)
        yield self._gauge("vllm:num_requests_waiting", "Sequences waiting to run.", load.waiting)
        yield self._gauge(
            "vllm:kv_cache_usage_perc",
            "Share of KV pages held by requests and leases, 0 to 1.",
            load.pages_in_use / load.pages_total if load.pages_total else 0.0,
        )
        config = InfoMetricFamily("vllm:cache_config", "Shape of the KV cache.", labels=self._names)
        config.add_metric(
            self._values, {"block_size": str(self._block_size), "num_gpu_blocks": str(load.pages_total)}
        )
        yield config

    def _engine_counters(self) -> Iterator[Metric]:
        counts = self._counts
        yield self._counter("vllm:prompt_tokens", "Prompt tokens computed or matched.", counts.prompt_tokens)
        yield self._counter("vllm:generation_tokens", "Tokens sampled.", counts.generation_tokens)
        yield self._counter(
            "vllm:prefix_cache_queries",
            "Tokens looked up in the prefix cache.",
            counts.prefix_queried_tokens,
        )
        yield self._counter(
            "vllm:prefix_cache_hits", "Tokens found in the prefix cache.", counts.prefix_hit_tokens
        )
        yield self._counters("vllm:request_success", "Requests ended.", "finished_reason", counts.finished)

    def _histograms(self) -> Iterator[Metric]:
        counts = self._counts
        for name, text, histogram in (
            ("vllm:time_to_first_token_seconds", "From arrival here to the first token.", counts.ttft_s),
            ("vllm:inter_token_latency_seconds", "Between tokens of one sequence.", counts.itl_s),
            ("vllm:e2e_request_latency_seconds", "From arrival here to the end here.", counts.e2e_s),
            ("disagg_worker_step_seconds", "One step of the engine.", counts.step_s),
        ):
            family = HistogramMetricFamily(name, text, labels=self._names)
            family.add_metric(self._values, histogram.buckets(), histogram.sum)
            yield family

    def _our_gauges(self, load: Load) -> Iterator[Metric]:
        pages = {"free": load.pages_free, "cached": load.pages_cached, "in_use": load.pages_in_use}
        yield self._gauges("disagg_worker_pages", "KV pages by who holds them.", "state", pages)
        yield self._gauges("disagg_worker_leases", "Attempts held by state.", "state", self._counts.leases)
        yield self._gauge(
            "disagg_worker_quarantined_pages",
            "Pages of ended attempts that a write may still reach.",
            self._counts.quarantined_pages,
        )
        yield self._gauge(
            "disagg_worker_queued_tokens", "Prompt tokens not yet computed.", load.queued_tokens
        )

    def _our_counters(self) -> Iterator[Metric]:
        counts = self._counts
        moved = {"sent": counts.sent_bytes, "received": counts.received_bytes}
        yield self._counters("disagg_worker_kv_bytes", "KV bytes moved.", "direction", moved)
        yield self._counters(
            "disagg_worker_kv_failures", "Transfers that failed.", "reason", counts.transfer_failures
        )
        yield self._counter(
            "disagg_worker_malformed_messages", "Control messages dropped as malformed.", self._malformed()
        )
        yield self._counter(
            "disagg_worker_stale_messages", "Messages of superseded attempts.", counts.stale_messages
        )

    def _gauge(self, name: str, text: str, value: float) -> Metric:
        family = GaugeMetricFamily(name, text, labels=self._names)
        family.add_metric(self._values, value)
        return family

    def _gauges(self, name: str, text: str, label: str, values: dict[str, int]) -> Metric:
        family = GaugeMetricFamily(name, text, labels=[*self._names, label])
        for value, number in list(values.items()):
            family.add_metric([*self._values, value], number)
        return family

    def _counter(self, name: str, text: str, value: float) -> Metric:
        family = CounterMetricFamily(name, text, labels=self._names)
        family.add_metric(self._values, value)
        return family

    def _counters(self, name: str, text: str, label: str, values: dict[str, int]) -> Metric:
        family = CounterMetricFamily(name, text, labels=[*self._names, label])
        for value, number in list(values.items()):
            family.add_metric([*self._values, value], number)
        return family
