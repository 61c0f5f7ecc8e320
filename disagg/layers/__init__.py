"""The pieces that decoders are made of.

`ops.py` has the operators and picks the kernel for the device: the C++ of csrc/cpu, or torch.
`rope.py` makes rotary tables. May import torch, `_cpu`, `kv`'s views and `errors`.
"""

from disagg.layers.rope import RopeSpec, cos_sin_cache

__all__ = ["RopeSpec", "cos_sin_cache"]
