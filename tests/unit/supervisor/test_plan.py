from pathlib import Path

import msgspec
import pytest

from disagg.config import RouterConfig, ServeConfig, WorkerConfig
from disagg.errors import ConfigError
from disagg.supervisor.plan import plan_processes, pool_sizes
from disagg.supervisor.supervisor import backoff_s

RUNTIME = Path("/run/x")


def serve(**fields: object) -> ServeConfig:
    return msgspec.convert(fields, ServeConfig)


def test_by_default_one_worker_of_each_pool() -> None:
    assert pool_sizes(serve()) == {"prefill": 1, "decode": 1, "unified": 0}


def test_unified_alone_is_the_aggregated_baseline() -> None:
    assert pool_sizes(serve(unified=2)) == {"prefill": 0, "decode": 0, "unified": 2}
    assert pool_sizes(serve(unified=2, prefill=1)) == {"prefill": 1, "decode": 1, "unified": 2}


@pytest.mark.parametrize("fields", [{"decode": 0}, {"prefill": 0, "decode": 0}])
def test_pools_that_cannot_serve_are_refused(fields: dict[str, int]) -> None:
    with pytest.raises(ConfigError):
        pool_sizes(serve(**fields))


def test_pools_have_their_own_tensor_parallel_size() -> None:
    specs = plan_processes(serve(prefill_tp=3, engine={"tensor_parallel_size": 2}), RUNTIME)
    sizes = {
        spec.name: spec.config.engine.tensor_parallel_size
        for spec in specs
        if isinstance(spec.config, WorkerConfig)
    }
    assert sizes == {"prefill-0": 3, "decode-0": 2}


def test_the_router_knows_every_worker() -> None:
    specs = plan_processes(serve(prefill=2), RUNTIME)
    assert isinstance(specs[-1].config, RouterConfig)
    assert specs[-1].config.workers == tuple(
        spec.config.control for spec in specs if isinstance(spec.config, WorkerConfig)
    )


def test_a_process_that_dies_at_once_is_not_restarted_in_a_tight_loop() -> None:
    assert backoff_s(0) == 0
    assert [backoff_s(n) for n in (1, 2, 3)] == [0.25, 0.5, 1.0]
    assert backoff_s(1000) == backoff_s(20)
