"""A group of one, and ranks that do not come. Real groups are in tests/integration."""

import threading

import pytest
import torch

from disagg.errors import WorkerLost
from disagg.parallel import Meeting, MeetingStore, TensorParallel


def test_a_group_of_one_communicates_with_nobody() -> None:
    meeting = Meeting()
    alone = TensorParallel.join(MeetingStore(meeting.put, meeting.get), 0, 1)
    tensor = torch.arange(3.0)
    assert alone.all_reduce(tensor) is tensor
    assert alone.gather_last_dim(tensor) is tensor
    alone.close()
    alone.close()


def test_ranks_that_do_not_come_are_reported() -> None:
    """A rank that died at start must not leave the others waiting for ever."""
    meeting = Meeting(timeout_s=0.1)
    with pytest.raises(WorkerLost, match="rank 0 of 2 could not meet the others"):
        TensorParallel.join(MeetingStore(meeting.put, meeting.get), 0, 2)


def test_ranks_of_threads_meet_at_one_table() -> None:
    meeting = Meeting()
    sums: list[float] = []

    def rank(number: int) -> None:
        group = TensorParallel.join(MeetingStore(meeting.put, meeting.get), number, 2)
        sums.append(group.all_reduce(torch.tensor([number + 1.0])).item())
        group.close()

    threads = [threading.Thread(target=rank, args=(number,)) for number in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert sums == [3.0, 3.0]


def test_closing_the_table_ends_every_wait() -> None:
    """A rank is known to be gone: nobody waits out the minute."""
    meeting = Meeting()
    threading.Timer(0.05, meeting.close).start()
    with pytest.raises(WorkerLost, match="a rank is gone"):
        meeting.get("key")
    meeting.close()


def test_a_broadcast_is_rank_0s() -> None:
    meeting = Meeting()
    seen: dict[int, list[float]] = {}

    def rank(number: int) -> None:
        group = TensorParallel.join(MeetingStore(meeting.put, meeting.get), number, 2)
        seen[number] = group.broadcast(torch.tensor([number + 5.0])).tolist()
        group.close()

    threads = [threading.Thread(target=rank, args=(number,)) for number in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert seen == {0: [5.0], 1: [5.0]}


class _Pending:
    """Work of a device that another rank does not take part in."""

    def query(self) -> bool:
        return False


class _Silent:
    def __init__(self) -> None:
        self.num_checks = 0

    def check(self) -> None:
        self.num_checks += 1
        if self.num_checks == 2:
            raise WorkerLost("rank 1 is gone")


def test_a_step_that_does_not_end_is_a_lost_rank() -> None:
    group = TensorParallel(0, 2, _Silent(), timeout_s=0.01)  # type: ignore[arg-type]
    with pytest.raises(WorkerLost, match=r"did not end within 0\.01 s: a rank hangs"):
        group.wait(_Pending())  # type: ignore[arg-type]


def test_what_nccl_knows_is_told_before(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("disagg.parallel.group.CHECK_S", 0.001)
    group = TensorParallel(0, 2, _Silent(), timeout_s=30.0)  # type: ignore[arg-type]
    with pytest.raises(WorkerLost, match="rank 1 is gone"):
        group.wait(_Pending())  # type: ignore[arg-type]
