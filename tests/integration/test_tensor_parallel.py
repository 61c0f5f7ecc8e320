"""Ranks in processes of their own: together they are the model that one rank is."""

import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Protocol

import pytest
import torch
from torch import Tensor
from torch._C import _distributed_c10d as c10d  # noqa: F401 - for the ranks' processes

from disagg.checkpoint import ModelFiles
from disagg.errors import WorkerLost
from disagg.models import load_model, load_spec
from disagg.parallel import Meeting, MeetingStore, TensorParallel
from support.checkpoints import make_checkpoint
from support.paged import PagedDriver, PagedSequence

FAMILIES = ("llama", "llama_linear", "qwen3", "qwen2", "qwen3_moe")
TESTS = Path(__file__).parents[1]
TIMEOUT_S = 200.0  # processes take long to start on a busy machine
COUNTS = [40, 1, 1, 30, 1]


class Run(Protocol):
    """Starts `body` in one process a rank, with `rank`, `size`, `out` and the joined `tp` defined."""

    def __call__(self, body: str, size: int) -> list[subprocess.Popen[bytes]]: ...


def tokens() -> list[int]:
    return torch.randint(3, 320, (sum(COUNTS),), generator=torch.Generator().manual_seed(3)).tolist()


def forward(folder: Path, tp: TensorParallel) -> Tensor:
    """Logits of every token: prefill chunks, one of which asks for no logits, and decodes."""
    decoder = load_model(ModelFiles(folder, "m", "test"), load_spec(folder), tp=tp)
    runs = PagedDriver(decoder)
    sequence, other = PagedSequence(tokens()), PagedSequence(tokens())
    runs.step([(other, 20)], logits_at=())
    return torch.cat([runs.step([(sequence, n)], range(n)) for n in COUNTS])


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Run]:
    processes: list[subprocess.Popen[bytes]] = []

    def begin(body: str, size: int) -> list[subprocess.Popen[bytes]]:
        for rank in range(size):
            setup = (
                f"import sys; sys.path.insert(0, {str(TESTS)!r})\n"
                "from pathlib import Path\nimport psutil, torch\ntorch.set_num_threads(1)\n"
                "from integration.test_tensor_parallel import *\n"
                f"rank, size, out = {rank}, {size}, Path({str(tmp_path)!r})\n"
                f"store = c10d.FileStore({str(tmp_path / 'store')!r}, size)\n"
                f"tp = TensorParallel.join(store, rank, size, timeout_s={TIMEOUT_S})\n"
            )
            processes.append(
                subprocess.Popen(
                    [sys.executable, "-c", setup + body], stdin=subprocess.PIPE, stdout=subprocess.PIPE
                )
            )
        return processes

    yield begin
    for process in processes:
        process.kill()
        process.communicate()


@pytest.mark.parametrize("size", [2, 3])
def test_ranks_together_compute_what_one_computes(tmp_path: Path, start: Run, size: int) -> None:
    """With tied and untied embeddings, biases that one rank adds, and a vocabulary that does not divide."""
    for family in FAMILIES:
        make_checkpoint(tmp_path / family, family, vocab_size=331)
    body = f"""
for family in {FAMILIES}:
    torch.save(forward(out / family, tp), out / f"{{family}}.{{rank}}.pt")
tp.close()
"""
    for process in start(body, size):
        assert process.wait(TIMEOUT_S) == 0
    for family in FAMILIES:
        expected = forward(tmp_path / family, TensorParallel.single())
        whole, *others = [torch.load(tmp_path / f"{family}.{rank}.pt") for rank in range(size)]
        torch.testing.assert_close(whole, expected, atol=2e-4, rtol=1e-4)
        assert all(other.shape == (sum(COUNTS), 0) for other in others)


def test_collectives_on_one_interface(start: Run) -> None:
    body = """
mine = torch.arange(6.0).view(2, 3) + 10 * rank
assert torch.equal(tp.all_reduce(mine.clone()), 3 * torch.arange(6.0).view(2, 3) + 30)
assert tp.all_reduce(torch.ones(3, dtype=torch.bfloat16)).tolist() == [3, 3, 3]
whole = tp.gather_last_dim(mine)
assert (whole is None) == (rank != 0)
if rank == 0:
    assert whole.tolist() == [[0, 1, 2, 10, 11, 12, 20, 21, 22], [3, 4, 5, 13, 14, 15, 23, 24, 25]]
listening = {c.laddr.ip for c in psutil.Process().net_connections() if c.status == "LISTEN"}
assert listening == {"127.0.0.1"}, listening
tp.close()
assert not [c for c in psutil.Process().net_connections() if c.status == "LISTEN"]
"""
    for process in start(body, 3):
        assert process.wait(TIMEOUT_S) == 0


def test_a_dead_rank_fails_the_others_at_once(tmp_path: Path, start: Run) -> None:
    """The router must learn within two seconds; a collective's timeout is a minute."""
    body = """
if rank == 1:
    sys.stdin.read()
print("ready", flush=True)
try:
    tp.all_reduce(torch.ones(3))
except WorkerLost as e:
    print("lost", flush=True)
"""
    first, second = start(body, 2)
    assert first.stdout is not None
    assert first.stdout.readline() == b"ready\n"
    second.kill()
    began = time.monotonic()
    assert first.stdout.readline() == b"lost\n"
    assert time.monotonic() - began < 2.0


def test_a_rank_that_is_late_loses_nobody_but_itself() -> None:
    meeting = Meeting(timeout_s=0.2)
    with pytest.raises(WorkerLost, match=r"rank 1 of 2 could not meet the others: .*did not come in 0.2 s"):
        TensorParallel.join(MeetingStore(meeting.put, meeting.get), 1, 2)
