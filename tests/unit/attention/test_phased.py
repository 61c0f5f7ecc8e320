import pytest
import torch

from disagg.attention import AttentionBatch, PhasedAttention, ReferenceAttention
from support.attention import Case, Heads, Piece, make_case


class Recording(ReferenceAttention):
    """Remembers what it was given."""

    def __init__(self) -> None:
        self.batches: list[AttentionBatch] = []

    def plan(self, batch: AttentionBatch) -> None:
        self.batches.append(batch)
        super().plan(batch)


def run(case: Case) -> tuple[Recording, Recording]:
    prefill, decode = Recording(), Recording()
    out = case.run(PhasedAttention(prefill, decode))
    assert torch.equal(out, case.run(ReferenceAttention()))
    return prefill, decode


def test_each_phase_gets_its_own_part_of_a_mixed_batch() -> None:
    case = make_case(Heads(), [Piece(20), Piece(33), Piece(40, 40), Piece(64, 5)], dtype=torch.float32)
    prefill, decode = run(case)
    (first,), (second,) = decode.batches, prefill.batches
    assert (first.num_decodes, first.num_sequences) == (2, 2)
    assert (second.num_decodes, second.num_sequences) == (0, 2)
    assert second.qo_indptr.tolist() == [0, 40, 45]
    assert second.page_indptr.tolist() == [0, 3, 7]
    assert torch.equal(torch.cat([first.positions, second.positions]), case.batch.positions)


@pytest.mark.parametrize("new", [1, 9])
def test_a_phase_without_work_is_not_asked(new: int) -> None:
    case = make_case(Heads(), [Piece(20, new), Piece(33, new)], dtype=torch.float32)
    prefill, decode = run(case)
    assert (len(prefill.batches), len(decode.batches)) == ((0, 1) if new == 1 else (1, 0))


def test_name_is_what_the_option_says() -> None:
    assert PhasedAttention(Recording(), Recording()).name == "reference,reference"
