"""One rank's end of a tensor-parallel group.

A group is made from an explicit store and touches none of torch's global state, so two engines
in one process do not meet. Only tensors travel, never pickled objects.
"""

from datetime import timedelta
from typing import Literal, Protocol, cast

import torch
from torch import Tensor
from torch._C import _distributed_c10d as c10d

from disagg.errors import WorkerLost

Backend = Literal["gloo", "nccl"]

DEFAULT_TIMEOUT_S = 60.0


class _Group(Protocol):
    """The part of torch's process groups that is used here; its stubs leave it out."""

    def allreduce(self, tensors: list[Tensor]) -> c10d.Work: ...

    def gather(
        self, outputs: list[list[Tensor]], inputs: list[Tensor], options: c10d.GatherOptions
    ) -> c10d.Work: ...

    def abort(self) -> None: ...


class TensorParallel:
    """The collectives a split model needs. Used by one thread; every rank calls the same ones in order."""

    def __init__(self, rank: int, size: int, group: _Group | None, store: object = None) -> None:
        assert 0 <= rank < size
        assert (group is None) == (size == 1)
        self.rank = rank
        self.size = size
        self._group = group
        self._store = store  # the group's threads use it for as long as they live

    @classmethod
    def single(cls) -> "TensorParallel":
        """A group of one, which communicates with nobody."""
        return cls(0, 1, None)

    @classmethod
    def join(
        cls,
        store: c10d.Store,
        rank: int,
        size: int,
        *,
        backend: Backend = "gloo",
        host: str = "127.0.0.1",
        timeout_s: float = DEFAULT_TIMEOUT_S,
    ) -> "TensorParallel":
        """Meet the other ranks; returns when all `size` are there.

        Args:
            store: Where this group alone leaves its addresses, such as a `MeetingStore`.
            rank: This process's, from 0.
            size: Ranks in all; 1 communicates with nobody and ignores the store.
            backend: `gloo` for tensors in memory, `nccl` for tensors on GPUs.
            host: Interface on which gloo listens for the other ranks.
            timeout_s: Longest wait for the ranks to meet, and for any later collective.

        Raises:
            WorkerLost: the others did not come in time.
        """
        if size == 1:
            return cls.single()
        timeout = timedelta(seconds=timeout_s)
        try:
            group = _make_group(backend, store, rank, size, host, timeout)
            parallel = cls(rank, size, group, store)
            if backend == "gloo":
                # Connections are made by the first collective: better now than in the first step.
                parallel.all_reduce(torch.zeros(1))
        except (RuntimeError, OSError, WorkerLost) as e:
            raise WorkerLost(f"rank {rank} of {size} could not meet the others: {e}") from e
        return parallel

    def all_reduce(self, tensor: Tensor) -> Tensor:
        """Sum `tensor` over all ranks, in place, and return it.

        Raises:
            WorkerLost: a rank died or did not take part in time. The group is then unusable.
        """
        if self._group is not None:
            self._wait(self._group.allreduce([tensor]))
        return tensor

    def gather_last_dim(self, tensor: Tensor) -> Tensor | None:
        """Join the ranks' pieces, all of one shape, along the last axis: on rank 0; None elsewhere.

        Raises:
            WorkerLost: as `all_reduce`.
        """
        if self._group is None:
            return tensor
        tensor = tensor.contiguous()
        pieces = [torch.empty_like(tensor) for _ in range(self.size)] if self.rank == 0 else []
        options = c10d.GatherOptions()
        options.rootRank = 0
        self._wait(self._group.gather([pieces] if pieces else [], [tensor], options))
        return torch.cat(pieces, dim=-1) if pieces else None

    def close(self) -> None:
        """Leave the group. The other ranks' collectives then fail. May be called twice."""
        if self._group is not None:
            self._group.abort()
        self._group = self._store = None

    def _wait(self, work: c10d.Work) -> None:
        try:
            work.wait()
        except RuntimeError as e:
            raise WorkerLost(f"a tensor-parallel rank was lost: rank {self.rank} saw {e}") from e


def _make_group(
    backend: Backend, store: c10d.Store, rank: int, size: int, host: str, timeout: timedelta
) -> _Group:
    if backend == "gloo":
        options = c10d.ProcessGroupGloo._Options()  # type: ignore[attr-defined]  # the stub has another name
        options._devices = [c10d.ProcessGroupGloo.create_device(hostname=host)]
        options._timeout = timeout
        return cast(_Group, c10d.ProcessGroupGloo(store, rank, size, options))
    nccl = c10d.ProcessGroupNCCL.Options()
    nccl._timeout = timeout
    return cast(_Group, c10d.ProcessGroupNCCL(store, rank, size, nccl))
