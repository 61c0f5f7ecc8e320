import pytest
import torch

from disagg.attention import ReferenceAttention
from support.attention import Heads, Piece, expected, make_case


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_equals_attention_in_float64(dtype: torch.dtype) -> None:
    case = make_case(Heads(page_size=3), [Piece(20), Piece(31, 31), Piece(50, 7)], dtype=dtype)
    tolerance = 1e-5 if dtype == torch.float32 else 1e-2
    out = case.run(ReferenceAttention())
    torch.testing.assert_close(out.double(), expected(case), atol=tolerance, rtol=tolerance)
