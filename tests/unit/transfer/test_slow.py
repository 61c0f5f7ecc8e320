from pathlib import Path

import pytest

from disagg.transfer.slow import LARGE_BYTES, NUM_WRITES, LinkFacts, LinkSpeed, why_slow


def test_a_link_is_slow_when_all_of_its_first_large_writes_are() -> None:
    speed = LinkSpeed()
    assert [speed.on_write(LARGE_BYTES, LARGE_BYTES / 0.5e9) for _ in range(NUM_WRITES)][-1]
    assert speed.bytes_per_s == pytest.approx(0.5e9)


def test_a_link_that_is_slow_is_said_once() -> None:
    speed = LinkSpeed()
    told = [speed.on_write(LARGE_BYTES, 1.0) for _ in range(3 * NUM_WRITES)]
    assert sum(told) == 1


def test_one_fast_write_shows_that_the_lane_is_right() -> None:
    """The others may have waited for the GPU."""
    speed = LinkSpeed()
    rates = [0.5e9, 100e9, 0.5e9, 0.5e9, 0.5e9, 0.5e9]
    assert not any(speed.on_write(LARGE_BYTES, LARGE_BYTES / rate) for rate in rates)


def test_small_writes_show_nothing() -> None:
    speed = LinkSpeed()
    assert not any(speed.on_write(LARGE_BYTES - 1, 10.0) for _ in range(10))


FAR = LinkFacts(is_one_host=False, is_one_namespace=False, ucx_tls=None, has_rdma=True, has_peermem=True)
NEAR = LinkFacts(is_one_host=True, is_one_namespace=True, ucx_tls=None, has_rdma=False, has_peermem=False)


@pytest.mark.parametrize(
    ("facts", "changes", "cause"),
    [
        (NEAR, {"ucx_tls": "tcp,self"}, "UCX_TLS=tcp,self leaves out cuda_ipc"),
        (NEAR, {"ucx_tls": "tcp,cuda"}, "CUDA IPC does not reach it"),
        (NEAR, {"ucx_tls": "^tcp"}, "CUDA IPC does not reach it"),
        (NEAR, {"is_one_namespace": False}, "hostPID and hostIPC"),
        (NEAR, {}, "peer access"),
        (FAR, {"has_rdma": False}, "no RDMA device"),
        (FAR, {"has_peermem": False}, "nvidia_peermem is not loaded"),
        (FAR, {}, "not known"),
    ],
)
def test_the_likeliest_cause_is_named(facts: LinkFacts, changes: dict[str, object], cause: str) -> None:
    fields = {name: getattr(facts, name) for name in LinkFacts.__slots__} | changes
    assert cause in why_slow(LinkFacts(**fields))  # type: ignore[arg-type]


def test_facts_are_looked_up_on_this_host(tmp_path: Path) -> None:
    assert LinkFacts.of("boot/1", "boot/2", {}, tmp_path) == LinkFacts(True, False, None, False, False)
    (tmp_path / "class/infiniband/mlx5_0").mkdir(parents=True)
    (tmp_path / "module/nvidia_peermem").mkdir(parents=True)
    facts = LinkFacts.of("boot/1", "other/1", {"UCX_TLS": "rc"}, tmp_path)
    assert facts == LinkFacts(False, False, "rc", True, True)
