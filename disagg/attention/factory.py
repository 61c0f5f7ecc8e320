"""From `--attention-backend` to a backend."""

import logging
from importlib.util import find_spec
from typing import Literal

import torch

from disagg.attention import flashinfer
from disagg.attention.base import AttentionBackend, AttentionSizes
from disagg.attention.cpu import CpuAttention
from disagg.attention.cuda import CudaDecode, is_fast
from disagg.attention.phased import PhasedAttention
from disagg.attention.reference import ReferenceAttention
from disagg.errors import ConfigError
from disagg.layers.kernels import why_no_cuda_kernels

log = logging.getLogger(__name__)

Phase = Literal["prefill", "decode"]

NAMES = ("auto", "cpu", "cuda", "reference", "fi")
CPU_DTYPES = (torch.float32, torch.bfloat16)


def make_attention(
    spec: str, sizes: AttentionSizes, device: torch.device | str, num_threads: int | None = None
) -> AttentionBackend:
    """Make the backend that `spec` names.

    Args:
        spec: A name for both phases, or PREFILL,DECODE. `auto` is the fastest that runs there.
        sizes: Of the model and its steps.
        device: Where the pool is.
        num_threads: CPU threads; by default torch's.

    Raises:
        ConfigError: an unknown name, or one that cannot run there; says what would.
    """
    where = torch.device(device)
    prefill, decode = _parse(spec)
    prefill = _pick(prefill, "prefill", where, sizes)
    decode = _pick(decode, "decode", where, sizes)
    first = _make(prefill, "prefill", sizes, where, num_threads)
    if prefill == decode and prefill != "fi":
        return first
    return PhasedAttention(first, _make(decode, "decode", sizes, where, num_threads))


def _parse(spec: str) -> tuple[str, str]:
    """Names of the prefill and the decode backend."""
    names = [name.strip() for name in spec.split(",")]
    if "fa" in names:
        raise ConfigError(
            "attention_backend fa is not in this version: flash-attn as released reads pages of 256 tokens "
            "alone, and FlashInfer's fa3 is the same algorithm for any; use fi or auto"
        )
    if len(names) > 2 or not set(names) <= set(NAMES):
        raise ConfigError(
            f"attention_backend must be one of {', '.join(NAMES)}, or two as PREFILL,DECODE; got {spec!r}"
        )
    return names[0], names[-1]


def _pick(name: str, phase: Phase, device: torch.device, sizes: AttentionSizes) -> str:
    """What `auto` stands for here."""
    if name != "auto":
        return name
    if device.type == "cpu":
        return "cpu"
    has_kernel = phase == "decode" and why_no_cuda_kernels() is None
    if has_kernel and (is_fast(sizes) or sizes.is_narrow):
        return "cuda"
    if find_spec("flashinfer") is not None and flashinfer.takes(sizes):
        return "fi"
    if has_kernel:
        return "cuda"
    log.warning(
        "attention runs by torch for %s, many times slower: FlashInfer is missing or not for it", phase
    )
    return "reference"


def _make(
    name: str, phase: Phase, sizes: AttentionSizes, device: torch.device, num_threads: int | None
) -> AttentionBackend:
    if name == "reference":
        return ReferenceAttention()
    if name == "cpu":
        _check_cpu(device, sizes.dtype)
        return CpuAttention(sizes.layout, sizes.num_qo_heads, num_threads or torch.get_num_threads())
    if device.type != "cuda":
        raise ConfigError(
            f"attention_backend {name} runs on an NVIDIA GPU (extra `disagg[cuda]`), not on device "
            f"{device.type}; use auto"
        )
    if name == "cuda":
        if phase == "prefill":
            raise ConfigError("attention_backend cuda is for decode alone; use fi,cuda")
        return CudaDecode(sizes, device)
    kind = flashinfer.FlashInferPrefill if phase == "prefill" else flashinfer.FlashInferDecode
    return kind(sizes, device)


def _check_cpu(device: torch.device, dtype: torch.dtype) -> None:
    if device.type != "cpu":
        raise ConfigError(f"attention_backend cpu cannot run on device {device.type}; use auto")
    if dtype not in CPU_DTYPES:
        name = str(dtype).removeprefix("torch.")
        raise ConfigError(f"attention_backend cpu takes dtype float32 or bfloat16, got {name}")
