"""Which of FlashInfer's kernels our backends use, and compiling them ahead, on a machine without a GPU.

    python -m disagg.attention.flashinfer_kernels --head-dims 128 --dtypes bfloat16 --phases prefill

puts them where FlashInfer looks first, into its own package. It needs nvcc (`pip install --group
cuda-build`, or CUDA_HOME), a C++ compiler, and ten minutes of processor time for each kernel of a
head size and a type. `MAX_JOBS` bounds how many compilers run at once; each takes 1 to 2 GB.

Imports nothing of ours: an image compiles in a layer that only a change of this file touches.
"""

import argparse
import os
import shutil
import sys
import sysconfig
import tempfile
import time
from collections.abc import Iterable
from itertools import product
from pathlib import Path
from typing import Any

import torch

HEAD_DIMS = (64, 128, 256)
DTYPES = (torch.bfloat16, torch.float16)
FA2, FA3 = "fa2", "fa3"
HOPPER_BACKENDS = {"prefill": FA3, "decode": FA2}
"""On other cards prefill is FA2 too."""
HOPPER_ARCH = "9.0a"


def arguments(dtype: torch.dtype, head_dim: int) -> tuple[Any, ...]:
    """What FlashInfer names a kernel by, as the plans of our backends make it: no window, no soft cap."""
    types = (dtype, dtype, dtype, torch.int32)  # of queries, KV, output and page tables
    return (*types, head_dim, head_dim, 0, False, False, False)


def spec_of(backend: str, dtype: torch.dtype, head_dim: int) -> Any:
    """FlashInfer's record of one kernel: its name, its sources, and whether it is compiled."""
    from flashinfer.jit.attention import gen_batch_prefill_module

    return gen_batch_prefill_module(backend, *arguments(dtype, head_dim))


def load(backend: str, dtype: torch.dtype, head_dim: int) -> None:
    """Load one kernel into this process, where FlashInfer's wrappers find it; compiled first if need be."""
    from flashinfer.prefill import get_batch_prefill_module

    get_batch_prefill_module(backend, *arguments(dtype, head_dim))


def compile_ahead(
    head_dims: Iterable[int], dtypes: Iterable[torch.dtype], phases: Iterable[str] = tuple(HOPPER_BACKENDS)
) -> list[Path]:
    """Compile kernels for Hopper, or FLASHINFER_CUDA_ARCH_LIST; those there are left. Returns new ones."""
    os.environ.setdefault("FLASHINFER_CUDA_ARCH_LIST", HOPPER_ARCH)
    wheels = Path(sysconfig.get_path("purelib"), "nvidia", "cu13")
    if (wheels / "bin" / "nvcc").exists():
        os.environ.setdefault("CUDA_HOME", str(wheels))
    from flashinfer.jit import build_jit_specs

    backends = [HOPPER_BACKENDS[phase] for phase in phases]
    specs = [spec_of(*kernel) for kernel in product(backends, dtypes, head_dims)]
    missing = [spec for spec in specs if not spec.is_aot]
    with tempfile.TemporaryDirectory() as folder:
        _make_link_names(wheels / "lib", Path(folder))
        os.environ["LIBRARY_PATH"] = os.pathsep.join([folder, os.environ.get("LIBRARY_PATH", "")])
        build_jit_specs(missing)
    for spec in missing:
        spec.aot_path.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(spec.jit_library_path, spec.aot_path)
    return [spec.aot_path for spec in missing]


def _make_link_names(libraries: Path, folder: Path) -> None:
    """Give the linker what it looks for: the run time by its short name, and a driver, which none needs."""
    if (runtime := next(libraries.glob("libcudart.so.*"), None)) is not None:
        (folder / "libcudart.so").symlink_to(runtime)
    (folder / "libcuda.so").write_text("/* No symbol of it is linked to. */")


def _dtype(name: str) -> torch.dtype:
    return {str(dtype).removeprefix("torch."): dtype for dtype in DTYPES}[name]


def main() -> None:
    """Compile what the command line names."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--head-dims", type=int, nargs="+", choices=HEAD_DIMS, default=HEAD_DIMS)
    parser.add_argument("--dtypes", type=_dtype, nargs="+", default=DTYPES)
    phases = tuple(HOPPER_BACKENDS)
    parser.add_argument("--phases", nargs="+", choices=phases, default=phases)
    a = parser.parse_args()
    began = time.monotonic()
    for path in compile_ahead(a.head_dims, a.dtypes, a.phases):
        print(f"{path.stat().st_size / 1e6:.1f} MB {path}")
    print(f"{time.monotonic() - began:.0f} s", file=sys.stderr)


if __name__ == "__main__":
    main()
