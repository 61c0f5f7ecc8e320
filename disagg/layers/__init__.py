"""The pieces that decoders are made of.

`ops.py` has the operators and picks who does the work: `cpu_ops.py` (the C++ of csrc/cpu),
`cuda_ops.py` (csrc/cuda) or `torch_ops.py`. `rope.py` makes rotary tables. May import torch, `_cpu`,
`_cuda`, `kv`'s views and `errors`.
"""

from disagg.layers.rope import RopeSpec, cos_sin_cache

__all__ = ["RopeSpec", "cos_sin_cache"]
