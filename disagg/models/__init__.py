"""One decoder for all model families, and loading it.

May import torch, `layers`, `parallel`, `attention`'s interface, `checkpoint` and `errors`; never
transformers' code. Read `spec.py` first (families are rows of a table), then `decoder.py`.
"""

from disagg.models.decoder import Decoder, LayerWeights
from disagg.models.load import load_model
from disagg.models.parameters import check_tensor_parallel, tensor_parallel_sizes
from disagg.models.spec import FAMILIES, ModelSpec, load_spec

__all__ = [
    "FAMILIES",
    "Decoder",
    "LayerWeights",
    "ModelSpec",
    "check_tensor_parallel",
    "load_model",
    "load_spec",
    "tensor_parallel_sizes",
]
