import pytest

from disagg.errors import ConfigError
from disagg.transfer import PoolMemory, make_transport, prepare_environment
from support.transfer import make_layout, make_pool


def test_loopback_keeps_ucx_off_outside_interfaces() -> None:
    """UCX has no authentication of its own."""
    environ: dict[str, str] = {}
    prepare_environment(environ)
    assert environ["UCX_NET_DEVICES"] == environ["NCCL_SOCKET_IFNAME"] == "lo"


def test_off_loopback_the_ports_are_a_range_that_a_firewall_can_name() -> None:
    environ: dict[str, str] = {}
    prepare_environment(environ, loopback_only=False)
    assert environ["UCX_TCP_PORT_RANGE"] == "20000-20999"
    assert "UCX_NET_DEVICES" not in environ


def test_what_the_user_has_set_is_left_alone() -> None:
    environ = {"UCX_NET_DEVICES": "mlx5_0:1", "NIXL_LOG_LEVEL": "DEBUG", "UCX_TCP_PORT_RANGE": "1-2"}
    prepare_environment(environ)
    prepare_environment(environ, loopback_only=False)
    assert environ["UCX_TCP_PORT_RANGE"] == "1-2"
    assert environ["UCX_NET_DEVICES"] == "mlx5_0:1"
    assert environ["NIXL_LOG_LEVEL"] == "DEBUG"


def test_unknown_transport_is_refused_by_name() -> None:
    pool = PoolMemory.of_array(make_pool(make_layout()))
    with pytest.raises(ConfigError, match="transport must be one of auto, nixl, cuda_ipc, nccl, got mpi"):
        make_transport("mpi", uuid="u", rank=0, pool=pool)


def test_nccl_is_for_gpus() -> None:
    pool = PoolMemory.of_array(make_pool(make_layout()))
    with pytest.raises(ConfigError, match="transport_backend is nccl, but the pool is in host memory"):
        make_transport("nccl", uuid="u", rank=0, pool=pool)
