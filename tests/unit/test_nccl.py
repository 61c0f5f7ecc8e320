"""What of NCCL needs no GPU."""

from collections.abc import Iterator

import pytest
import torch  # brings the library

from disagg import nccl
from disagg.errors import ConfigError


@pytest.fixture
def reloaded() -> Iterator[None]:
    nccl._library.cache_clear()
    yield
    nccl._library.cache_clear()


def test_a_missing_library_is_one_sentence(monkeypatch: pytest.MonkeyPatch, reloaded: None) -> None:
    monkeypatch.setattr(nccl, "LIBRARY", "libnothing.so.2")
    with pytest.raises(ConfigError, match="needs NCCL, which does not load: libnothing"):
        nccl.require()


@pytest.mark.skipif(not torch.distributed.is_nccl_available(), reason="torch without CUDA")
def test_ids_are_new_each_time() -> None:
    ids = {nccl.new_id() for _ in range(3)}
    assert len(ids) == 3
    assert all(len(unique_id) == nccl.ID_BYTES for unique_id in ids)


@pytest.mark.skipif(not torch.distributed.is_nccl_available(), reason="torch without CUDA")
def test_every_function_of_the_library_is_there(reloaded: None) -> None:
    library = nccl._library()
    assert all(getattr(library, name).argtypes == kinds for name, kinds in nccl._SIGNATURES.items())
