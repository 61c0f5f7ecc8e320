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
        _cuda.silu_and_mul(torch.zeros(1, 2), torch.zeros(1, 1), 0)
