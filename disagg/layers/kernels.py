"""Whether the CUDA kernels of csrc/cuda run here."""

import functools
from importlib.util import find_spec

import torch

HOPPER = (9, 0)
"""The compute capability that they are compiled for, and no other."""


@functools.cache
def why_no_cuda_kernels() -> str | None:
    """Why `disagg._cuda` does not run on this process's GPU; None where it does."""
    if find_spec("disagg._cuda") is None:
        return "this build has none: no nvcc was found when it was installed"
    if not torch.cuda.is_available():
        return "torch finds no GPU"
    capability = torch.cuda.get_device_capability()
    if capability != HOPPER:
        name = torch.cuda.get_device_name()
        return f"they are for Hopper, compute capability 9.0; {name} has {capability[0]}.{capability[1]}"
    return None
