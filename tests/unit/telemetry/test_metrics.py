from prometheus_client import CollectorRegistry

from disagg.telemetry import RouterMetrics

NAMES = {
    "disagg_requests_total",
    "disagg_kv_transfer_bytes_total",
    "disagg_kv_transfer_seconds",
    "disagg_kv_transfer_failures_total",
    "disagg_prefix_predicted_tokens_total",
    "disagg_prefix_actual_tokens_total",
    "disagg_leases",
    "disagg_retries_total",
    "disagg_silent_local_total",
}


def test_the_router_has_the_series_that_dashboards_lean_on() -> None:
    leases = {"decode": 1}
    metrics = RouterMetrics(CollectorRegistry(), lambda: leases)
    text = metrics.render().decode()
    helped = {line.split()[2] for line in text.splitlines() if line.startswith("# HELP")}
    assert helped >= NAMES
    assert all(name.startswith("disagg_") for name in helped), "it repeats no worker's series"
    assert 'disagg_leases{state="decode"} 1.0' in text
    leases["decode"] = 2
    assert 'disagg_leases{state="decode"} 2.0' in metrics.render().decode()


def test_two_routers_in_one_process_share_nothing() -> None:
    first = RouterMetrics(CollectorRegistry(), dict)
    second = RouterMetrics(CollectorRegistry(), dict)
    first.silent_local.inc()
    assert "disagg_silent_local_total 0.0" in second.render().decode()
