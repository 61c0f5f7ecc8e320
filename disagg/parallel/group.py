"""One rank's end of a tensor-parallel group: gloo between CPUs, NCCL between GPUs.

A group is made from an explicit store and touches none of torch's global state, so two engines
in one process do not meet. Only tensors travel, never pickled objects.
"""

import time
from datetime import timedelta
from typing import Protocol, cast

import torch
from torch import Tensor
from torch._C import _distributed_c10d as c10d

from disagg import nccl
from disagg.errors import WorkerLost

DEFAULT_TIMEOUT_S = 60.0
POLL_S = 2e-5
"""Between two looks at a device's work that other ranks take part in."""
CHECK_S = 0.5
"""Between two questions whether NCCL has lost a rank."""
_ID_KEY = "nccl"


class _Group(Protocol):
    """Collectives over two ranks or more; on a device they are queued on torch's current stream."""

    def all_reduce(self, tensor: Tensor) -> None: ...

    def gather(self, tensor: Tensor) -> list[Tensor] | None:
        """Every rank's tensor on rank 0; None elsewhere."""

    def broadcast(self, tensor: Tensor) -> None:
        """Overwrite it with rank 0's."""

    def check(self) -> None:
        """Raise `WorkerLost` where a rank is known to be gone."""

    def close(self) -> None: ...


class TensorParallel:
    """The collectives a split model needs. Used by one thread; every rank calls the same ones in order."""

    def __init__(
        self, rank: int, size: int, group: _Group | None, timeout_s: float = DEFAULT_TIMEOUT_S
    ) -> None:
        assert 0 <= rank < size
        assert (group is None) == (size == 1)
        self.rank = rank
        self.size = size
        self._group = group
        self._timeout_s = timeout_s

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
        device: torch.device | None = None,
        host: str = "127.0.0.1",
        timeout_s: float = DEFAULT_TIMEOUT_S,
    ) -> "TensorParallel":
        """Meet the other ranks; returns when all `size` are there.

        Args:
            store: Where this group alone leaves its addresses, such as a `MeetingStore`.
            rank: This process's, from 0.
            size: Ranks in all; 1 communicates with nobody and ignores the store.
            device: Where this rank's tensors are, by default in memory. GPUs have NCCL, nothing else.
            host: Interface on which gloo listens for the other ranks.
            timeout_s: Longest wait for the ranks to meet, and for any later step.

        Raises:
            ConfigError: NCCL is missing, or two ranks have one GPU.
            WorkerLost: the others did not come in time.
        """
        if size == 1:
            return cls.single()
        try:
            if device is not None and device.type == "cuda":
                group: _Group = _Nccl.join(store, rank, size, device)
            else:
                group = _Gloo(store, rank, size, host, timeout_s)
        except (RuntimeError, OSError, WorkerLost) as e:
            raise WorkerLost(f"rank {rank} of {size} could not meet the others: {e}") from e
        return cls(rank, size, group, timeout_s)

    def all_reduce(self, tensor: Tensor) -> Tensor:
        """Sum `tensor`, which is contiguous, over all ranks, in place, and return it.

        Raises:
            WorkerLost: a rank died or did not take part in time. The group is then unusable.
        """
        if self._group is not None:
            self._group.all_reduce(tensor)
        return tensor

    def gather_last_dim(self, tensor: Tensor) -> Tensor | None:
        """Join the ranks' pieces, all of one shape, along the last axis: on rank 0; None elsewhere.

        Raises:
            WorkerLost: as `all_reduce`.
        """
        if self._group is None:
            return tensor
        pieces = self._group.gather(tensor.contiguous())
        return None if pieces is None else torch.cat(pieces, dim=-1)

    def broadcast(self, tensor: Tensor) -> Tensor:
        """Overwrite `tensor`, which is contiguous, with rank 0's, and return it.

        Raises:
            WorkerLost: as `all_reduce`.
        """
        if self._group is not None:
            self._group.broadcast(tensor)
        return tensor

    def wait(self, done: torch.cuda.Event) -> None:
        """Wait for work of this rank's GPU in which the others take part.

        Raises:
            WorkerLost: a rank is gone or hangs. The GPU then stays busy until this process ends.
        """
        if self._group is None:
            done.synchronize()
            return
        began_at = checked_at = time.monotonic()
        while not done.query():  # type: ignore[no-untyped-call]
            now = time.monotonic()
            if now - began_at > self._timeout_s:
                raise WorkerLost(f"a step did not end within {self._timeout_s:g} s: a rank hangs")
            if now - checked_at > CHECK_S:
                checked_at = now
                self._group.check()
            time.sleep(POLL_S)

    def close(self) -> None:
        """Leave the group. The other ranks' collectives then fail. May be called twice."""
        if self._group is not None:
            self._group.close()
        self._group = None


class _Gloo:
    """By threads and TCP, for tensors in memory. A call returns when it is done."""

    def __init__(self, store: c10d.Store, rank: int, size: int, host: str, timeout_s: float) -> None:
        options = c10d.ProcessGroupGloo._Options()  # type: ignore[attr-defined]  # the stub has another name
        options._devices = [c10d.ProcessGroupGloo.create_device(hostname=host)]
        options._timeout = timedelta(seconds=timeout_s)
        self._rank, self._size = rank, size
        self._store = store  # the group's threads use it for as long as they live
        self._group = cast(_TorchGroup, c10d.ProcessGroupGloo(store, rank, size, options))
        # Connections are made by the first collective: better now than in the first step.
        self.all_reduce(torch.zeros(1))

    def all_reduce(self, tensor: Tensor) -> None:
        self._wait(self._group.allreduce([tensor]))

    def gather(self, tensor: Tensor) -> list[Tensor] | None:
        pieces = [torch.empty_like(tensor) for _ in range(self._size)] if self._rank == 0 else []
        options = c10d.GatherOptions()
        options.rootRank = 0
        self._wait(self._group.gather([pieces] if pieces else [], [tensor], options))
        return pieces or None

    def broadcast(self, tensor: Tensor) -> None:
        options = c10d.BroadcastOptions()
        options.rootRank = 0
        self._wait(self._group.broadcast([tensor], options))

    def check(self) -> None:
        """Each call has told it."""

    def close(self) -> None:
        self._group.abort()

    def _wait(self, work: c10d.Work) -> None:
        try:
            work.wait()
        except RuntimeError as e:
            raise WorkerLost(f"a tensor-parallel rank was lost: rank {self._rank} saw {e}") from e


class _TorchGroup(Protocol):
    """The part of torch's process groups that is used here; its stubs leave it out."""

    def allreduce(self, tensors: list[Tensor]) -> c10d.Work: ...

    def gather(
        self, outputs: list[list[Tensor]], inputs: list[Tensor], options: c10d.GatherOptions
    ) -> c10d.Work: ...

    def broadcast(self, tensors: list[Tensor], options: c10d.BroadcastOptions) -> c10d.Work: ...

    def abort(self) -> None: ...


class _Nccl:
    """By NCCL, on the current stream: nothing waits for the device, and a CUDA graph may hold all of it.

    A lost rank shows as work that does not end: rank 0 sees it in `TensorParallel.wait`, and by its link
    to the rank's process much earlier.
    """

    def __init__(self, communicator: nccl.Communicator, rank: int, size: int) -> None:
        self._nccl = communicator
        self._rank, self._size = rank, size

    @classmethod
    def join(cls, store: c10d.Store, rank: int, size: int, device: torch.device) -> "_Nccl":
        if rank == 0:
            store.set(_ID_KEY, nccl.new_id())  # type: ignore[arg-type]  # the stub knows str alone
        unique_id: bytes = store.get(_ID_KEY)
        with torch.cuda.device(device):
            return cls(nccl.Communicator(unique_id, rank, size), rank, size)

    def all_reduce(self, tensor: Tensor) -> None:
        assert tensor.is_contiguous()
        type_name = str(tensor.dtype).removeprefix("torch.")
        self._nccl.all_reduce(tensor.data_ptr(), tensor.numel(), type_name, _stream(tensor))

    def gather(self, tensor: Tensor) -> list[Tensor] | None:
        stream = _stream(tensor)
        if self._rank != 0:
            self._nccl.send(tensor.data_ptr(), tensor.nbytes, 0, stream)
            return None
        pieces = [tensor, *(torch.empty_like(tensor) for _ in range(1, self._size))]
        with self._nccl.group():
            for rank, piece in enumerate(pieces[1:], start=1):
                self._nccl.receive(piece.data_ptr(), piece.nbytes, rank, stream)
        return pieces

    def broadcast(self, tensor: Tensor) -> None:
        assert tensor.is_contiguous()
        self._nccl.broadcast(tensor.data_ptr(), tensor.nbytes, 0, _stream(tensor))

    def check(self) -> None:
        self._nccl.check()

    def close(self) -> None:
        """Leave it to the end of the process: `abort` would wait for the graphs that hold its operations."""


def _stream(tensor: Tensor) -> int:
    """The raw handle of torch's current stream on the tensor's device."""
    return torch._C._cuda_getCurrentRawStream(tensor.device.index)
