"""Which rank gets which GPU."""

import pytest
import torch

from disagg.engine.build import pick_device
from disagg.errors import ConfigError


@pytest.fixture
def four_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    monkeypatch.delenv("NCCL_MULTI_RANK_GPU_ENABLE", raising=False)


@pytest.mark.usefixtures("four_gpus")
def test_ranks_of_a_node_have_a_gpu_each() -> None:
    assert [pick_device("auto", rank, 4).index for rank in range(8)] == [0, 1, 2, 3, 0, 1, 2, 3]
    assert sorted(pick_device("cuda", rank, 3).index for rank in range(3, 6)) == [0, 1, 3]
    assert pick_device("cpu", 5, 8) == torch.device("cpu")


@pytest.mark.usefixtures("four_gpus")
def test_too_few_gpus_are_told_unless_nccl_may_share_one(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError, match="5 ranks on one node need as many GPUs, but torch finds 4"):
        pick_device("auto", 0, 5)
    monkeypatch.setenv("NCCL_MULTI_RANK_GPU_ENABLE", "1")
    assert pick_device("auto", 4, 5) == torch.device("cuda", 0)


def test_a_gpu_that_is_not_there_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ConfigError, match="torch finds no GPU here"):
        pick_device("cuda")
    assert pick_device("auto") == torch.device("cpu")
