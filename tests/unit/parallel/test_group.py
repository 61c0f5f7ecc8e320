"""A group of one, and addresses that are none. Real groups are in tests/integration."""

import pytest
import torch

from disagg.errors import ConfigError, WorkerLost
from disagg.parallel import TensorParallel


def test_a_group_of_one_communicates_with_nobody() -> None:
    alone = TensorParallel.join("nonsense", 0, 1)
    tensor = torch.arange(3.0)
    assert alone.all_reduce(tensor) is tensor
    assert alone.gather_last_dim(tensor) is tensor
    alone.close()
    alone.close()


@pytest.mark.parametrize("address", ["", "127.0.0.1:1", "tcp://127.0.0.1", "env://", "file://"])
def test_an_address_of_another_form_is_refused(address: str) -> None:
    with pytest.raises(ConfigError, match="is not file:///PATH or tcp://HOST:PORT"):
        TensorParallel.join(address, 0, 2, timeout_s=1.0)


def test_ranks_that_do_not_come_are_reported(tmp_path_factory: pytest.TempPathFactory) -> None:
    """A rank that died at start must not leave the others waiting for ever."""
    path = tmp_path_factory.mktemp("group") / "store"
    with pytest.raises(WorkerLost, match="rank 0 of 2 could not meet the others"):
        TensorParallel.join(f"file://{path}", 0, 2, timeout_s=0.2)
