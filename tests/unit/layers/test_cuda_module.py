"""What can be said of the CUDA module without a GPU; tests/gpu has the rest."""

import ast
from pathlib import Path

import pytest
import torch

import disagg

_cuda = pytest.importorskip("disagg._cuda", reason="built without an nvcc")


def test_its_functions_are_those_that_its_types_name() -> None:
    stub = Path(disagg.__file__).with_name("_cuda.pyi").read_text()
    named = {node.name for node in ast.parse(stub).body if isinstance(node, ast.FunctionDef | ast.ClassDef)}
    assert {name for name in vars(_cuda) if not name.startswith("_")} == named


def test_only_cuda_tensors_are_taken() -> None:
    """A pointer to host memory would end the whole process."""
    with pytest.raises(TypeError):
        _cuda.silu_and_mul(torch.zeros(1, 2), torch.zeros(1, 1), False, 0)


def test_gate_and_up_are_interleaved_by_eights() -> None:
    """The kernel has a gate and its up in one thread only so."""
    cuda_ops = pytest.importorskip("disagg.layers.cuda_ops")
    rows = torch.arange(32)
    want = [*range(8), *range(16, 24), *range(8, 16), *range(24, 32)]
    for weight in (rows, rows[:, None].expand(32, 3)):
        packed = cuda_ops.pack_gate_up(weight.clone())
        assert torch.equal(packed, weight[torch.tensor(want)])


@pytest.mark.parametrize("rows", [1, 64, 65, 240, 256])
@pytest.mark.parametrize(("n", "k"), [(4096, 1024), (1024, 2048), (28672, 4096), (64, 64)])
def test_a_plan_of_a_product_fits_its_sizes(n: int, k: int, rows: int) -> None:
    plan = _cuda.plan_linear(rows, n, k, False, 132)
    assert plan.multicast * plan.splits <= 8
    assert _cuda.linear_workspace_bytes(plan, rows, n, k) < 20 << 20


def test_products_of_other_sizes_have_no_plan() -> None:
    for rows, n, k in ((257, 64, 64), (1, 96, 64), (1, 64, 96), (1, 64, 0)):
        with pytest.raises(ValueError, match=r"must be|more than"):
            _cuda.plan_linear(rows, n, k, False, 132)


def test_own_products_are_where_they_were_measured_to_be_faster() -> None:
    cuda_ops = pytest.importorskip("disagg.layers.cuda_ops")
    qwen = [(4096, 1024), (1024, 2048), (6144, 1024), (1024, 3072)]
    llama = [(6144, 4096), (4096, 4096), (28672, 4096), (4096, 14336)]
    assert [cuda_ops.max_own_rows(*shape) for shape in qwen] == [64, 128, 64, 128]
    assert [cuda_ops.max_own_rows(*shape) for shape in llama] == [0, 64, 128, 0]
    for vocabulary_or_odd in ((151936, 1024), (128256, 4096), (96, 64), (64, 96)):
        assert cuda_ops.max_own_rows(*vocabulary_or_odd) == 0
