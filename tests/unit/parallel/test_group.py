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
