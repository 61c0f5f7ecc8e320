"""From `--attention-backend` to a backend."""

import torch

from disagg.attention.base import AttentionBackend
from disagg.attention.cpu import CpuAttention
from disagg.attention.phased import PhasedAttention
from disagg.attention.reference import ReferenceAttention
from disagg.errors import ConfigError
from disagg.kv.layout import PageLayout

NAMES = ("auto", "cpu", "reference", "fi", "fa")
CPU_DTYPES = (torch.float32, torch.bfloat16)


def make_attention(
    spec: str,
    *,
    layout: PageLayout,
    num_qo_heads: int,
    device: torch.device | str,
    dtype: torch.dtype,
    num_threads: int | None = None,
) -> AttentionBackend:
    """Make the backend that `spec` names.

    Args:
        spec: A name for both phases, or PREFILL,DECODE. `auto` is the fastest that runs there.
        layout: This rank's pages.
        num_qo_heads: Query heads of this rank.
        device: Where the pool is.
        dtype: Of queries and the pool.
        num_threads: CPU threads; by default torch's.

    Raises:
        ConfigError: an unknown name, or one that cannot run there; says what would.
    """
    where = torch.device(device)

    def make(name: str) -> AttentionBackend:
        name = _pick(name, where)
        if name == "reference":
            return ReferenceAttention()
        _check_cpu(where, dtype)
        return CpuAttention(layout, num_qo_heads, num_threads or torch.get_num_threads())

    prefill, decode = _parse(spec)
    return make(prefill) if prefill == decode else PhasedAttention(make(prefill), make(decode))


def _parse(spec: str) -> tuple[str, str]:
    """Names of the prefill and the decode backend."""
    names = [name.strip() for name in spec.split(",")]
    if len(names) > 2 or not set(names) <= set(NAMES):
        raise ConfigError(
            f"attention_backend must be one of {', '.join(NAMES)}, or two as PREFILL,DECODE; got {spec!r}"
        )
    return names[0], names[-1]


def _pick(name: str, device: torch.device) -> str:
    """A name that can be made here."""
    if name in ("fi", "fa"):
        library, extra = {"fi": ("FlashInfer", "cuda"), "fa": ("flash-attn", "flash-attn")}[name]
        raise ConfigError(
            f"attention_backend {name} is {library} on an NVIDIA GPU (extra `disagg[{extra}]`), which this "
            "version does not have yet; use auto"
        )
    if name == "auto":
        return "cpu" if device.type == "cpu" else "reference"
    return name


def _check_cpu(device: torch.device, dtype: torch.dtype) -> None:
    if device.type != "cpu":
        raise ConfigError(f"attention_backend cpu cannot run on device {device.type}; use auto")
    if dtype not in CPU_DTYPES:
        name = str(dtype).removeprefix("torch.")
        raise ConfigError(f"attention_backend cpu takes dtype float32 or bfloat16, got {name}")
