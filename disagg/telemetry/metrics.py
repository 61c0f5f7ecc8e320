"""The router's series, declared once.

They repeat none of a worker's, which have vLLM's names and are served by each worker itself.
Histograms, not averages.
"""

from collections.abc import Callable, Iterable, Mapping

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.core import GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

LATENCY_BUCKETS_S = (
    0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0, 20.0, 40.0, 80.0,
    160.0,
)  # fmt: skip
STEP_BUCKETS_S = (
    0.0005, 0.001, 0.0025, 0.005, 0.01, 0.015, 0.02, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.4, 0.8, 1.6, 5.0
)  # fmt: skip
TRANSFER_BUCKETS_S = (0.0001, 0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 10.0)


def render(registry: CollectorRegistry) -> bytes:
    """Return the body of `/metrics`, Prometheus text."""
    return generate_latest(registry)


class RouterMetrics:
    """The router's own series."""

    def __init__(self, registry: CollectorRegistry, leases_by_state: Callable[[], Mapping[str, int]]) -> None:
        """Register all; `leases_by_state` is asked at each scrape."""
        self._registry = registry
        registry.register(_Leases(leases_by_state))

        def counter(name: str, text: str, *labels: str) -> Counter:
            return Counter(name, text, labels, registry=registry)

        def histogram(name: str, text: str, buckets: tuple[float, ...]) -> Histogram:
            return Histogram(name, text, registry=registry, buckets=buckets)

        self.requests = counter(
            "disagg_requests", "Requests that ended, by decision and how.", "decision", "finish_reason"
        )
        self.rejected = counter("disagg_rejected_requests", "Requests answered with an error.", "error")
        self.silent_local = counter(
            "disagg_silent_local", "Sequences that should have been disaggregated and were not."
        )
        self.kv_bytes = counter("disagg_kv_transfer_bytes", "KV bytes that arrived.", "transport")
        self.kv_s = histogram("disagg_kv_transfer_seconds", "First write to last.", TRANSFER_BUCKETS_S)
        self.kv_failures = counter("disagg_kv_transfer_failures", "KV that did not arrive.", "reason")
        self.prefix_predicted = counter(
            "disagg_prefix_predicted_tokens", "Cached tokens that the index promised."
        )
        self.prefix_actual = counter("disagg_prefix_actual_tokens", "Cached tokens that workers found.")
        self.distrusted = counter("disagg_prefix_distrusted", "Workers whose summary was found to lie.")
        self.retries = counter("disagg_retries", "Attempts that had to be made again.", "stage")
        self.workers_lost = counter("disagg_workers_lost", "Workers that died or fell silent.", "role")
        self.bad_messages = counter("disagg_bad_messages", "Messages of workers that could not be decoded.")
        self.prompt_tokens = counter("disagg_prompt_tokens", "Prompt tokens of requests that ended.")
        self.completion_tokens = counter("disagg_completion_tokens", "Tokens that were sent to clients.")
        self.queue_s = histogram("disagg_queue_seconds", "Arrival to first hand-over.", LATENCY_BUCKETS_S)
        self.ttft_s = histogram(
            "disagg_time_to_first_token_seconds", "Arrival to first token.", LATENCY_BUCKETS_S
        )
        self.tpot_s = histogram(
            "disagg_time_per_output_token_seconds", "Mean gap of one request's tokens.", STEP_BUCKETS_S
        )
        self.request_s = histogram("disagg_request_seconds", "Arrival to last token.", LATENCY_BUCKETS_S)
        self.queued_requests = Gauge(
            "disagg_queued_requests", "Sequences waiting in the router.", registry=registry
        )
        self.queued_tokens = Gauge("disagg_queued_tokens", "Their prompt tokens.", registry=registry)

    def render(self) -> bytes:
        """Return the body of `/metrics`."""
        return render(self._registry)


class _Leases(Collector):
    """`disagg_leases{state}`, counted when asked: a gauge kept by hand would drift."""

    def __init__(self, count: Callable[[], Mapping[str, int]]) -> None:
        self._count = count

    def describe(self) -> Iterable[Metric]:
        return [self._family()]

    def collect(self) -> Iterable[Metric]:
        family = self._family()
        for state, number in self._count().items():
            family.add_metric([state], number)
        return [family]

    @staticmethod
    def _family() -> GaugeMetricFamily:
        return GaugeMetricFamily(
            "disagg_leases", "Attempts that hold pages at workers, by state.", labels=["state"]
        )
