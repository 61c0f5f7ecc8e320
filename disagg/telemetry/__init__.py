"""Logs of every process and the router's metrics. Owns the names of its series; knows nothing of who counts.

Depends on nothing else of ours. Series go to a `CollectorRegistry` that the caller passes, never to
prometheus_client's global one. Read `metrics.py` first; a worker's own series, under vLLM's names, are
in `worker/metrics.py`, where the engine thread counts without a lock.
"""

from disagg.telemetry.logs import fields, set_up_logging
from disagg.telemetry.metrics import RouterMetrics, render
from disagg.telemetry.stages import Stages

__all__ = ["RouterMetrics", "Stages", "fields", "render", "set_up_logging"]
