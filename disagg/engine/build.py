"""From configuration to a running engine.

    rank = load_rank(model, engine, tp=tp)      on every rank
    make_engine(rank, engine, runner=...)       on rank 0

`build_engine` does both for a group of one.
"""

import os
import time
from collections.abc import Callable

import torch
from msgspec import Struct
from torch import Tensor

from disagg.attention import AttentionBackend, AttentionSizes, make_attention
from disagg.checkpoint import ModelFiles, resolve
from disagg.config import EngineConfig, ModelConfig
from disagg.engine.admission import Limits
from disagg.engine.engine import Engine, Runner
from disagg.engine.ranks import LeadingRunner
from disagg.engine.runner import ModelRunner
from disagg.errors import ConfigError
from disagg.kv import KvCache, PageLayout
from disagg.layers.fp8 import MULTIPLE
from disagg.layers.kernels import why_no_cuda_kernels
from disagg.models import Decoder, ModelSpec, check_tensor_parallel, load_model, load_spec
from disagg.nccl import MULTI_RANK
from disagg.parallel import TensorParallel
from disagg.protocol import KvLayout

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
FP8 = "float8_e4m3fn"
KV_DTYPES = {**DTYPES, FP8: torch.float8_e4m3fn}
CPU_POOL_BYTES = 1 << 30
STEP_TOKENS = {"cuda": 1024, "cpu": 256}
"""Few enough for a step to end within a fraction of a second: aborts and decodes wait that long."""
GPU_STEP_BYTES = 64
"""Bytes of activations that a step needs at most for each new token and each unit of the MLP's width."""
GPU_FIXED_BYTES = 1 << 30
"""Room for what does not grow with a step: attention's workspaces, the library handles, the graphs."""


class Rank(Struct, frozen=True, kw_only=True):
    """One rank's share of a model, loaded and ready to run plans."""

    files: ModelFiles
    spec: ModelSpec
    layout: KvLayout
    """Of the whole group."""
    num_pages: int
    max_model_len: int
    dtype: str
    device: torch.device
    runner: Runner
    pool: Tensor
    """This rank's pages, C-contiguous `[page, kv_head, layer, 2, page_size, head_dim]`."""


def load_rank(
    model: ModelConfig,
    engine: EngineConfig,
    *,
    tp: TensorParallel | None = None,
    device: torch.device | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Rank:
    """Load one rank's weights and make its KV pool. Sets torch's thread count for this process.

    Args:
        model: Which model.
        engine: `tensor_parallel_size` must be the group's.
        tp: This rank's group, joined; None is a group of one.
        device: Where this rank runs, by default where `pick_device` puts the only rank.
        progress: Told (bytes placed, bytes in all) while weights load.

    Raises:
        ConfigError: the model cannot be had, or does not fit the configuration or the memory.
    """
    tp = tp or TensorParallel.single()
    files = resolve(model.model, config_only=model.load_format == "dummy")
    spec = load_spec(files.path)
    check_tensor_parallel(spec, tp.size)
    device = device or pick_device(model.device)
    if device.type == "cuda":
        torch.cuda.set_device(device)  # where kernels are launched that name no device
    dtype = spec.dtype if model.dtype == "auto" else model.dtype
    kv_dtype = _pick_kv_dtype(engine, dtype, device)
    if model.quantization is not None:
        _check_quantization(model.quantization, spec, device, dtype, tp.size)
    if engine.num_threads is not None:
        torch.set_num_threads(engine.num_threads)
    decoder = load_model(
        files,
        spec,
        device=device,
        dtype=DTYPES[dtype],
        tp=tp,
        load_format=model.load_format,
        seed=model.seed,
        quantization=model.quantization,
        progress=progress,
    )
    layout = KvLayout(
        page_size=engine.block_size,
        num_kv_heads=spec.num_kv_heads,
        num_layers=spec.num_layers,
        head_dim=spec.head_dim,
        dtype=kv_dtype,
        tp_size=tp.size,
    )
    share = PageLayout.of(layout)
    num_pages = _agree(tp, _pool_bytes(engine, spec, device) // share.page_bytes, device)
    max_model_len = pick_max_model_len(model, spec, num_pages, engine.block_size)
    sizes = AttentionSizes(
        layout=share,
        num_qo_heads=spec.num_heads // tp.size,
        dtype=DTYPES[dtype],
        kv_dtype=KV_DTYPES[kv_dtype],
        max_rows=engine.max_num_seqs,
        max_page_indices=engine.max_num_seqs * -(-max_model_len // engine.block_size),
    )
    try:
        attention = make_attention(engine.attention_backend, sizes, device, engine.num_threads)
        pool = _make_pool((num_pages, *share.shape), KV_DTYPES[kv_dtype], device)
        runner = _make_runner(decoder, attention, pool, engine, sizes)
    except torch.OutOfMemoryError as error:
        gigabytes = num_pages * share.page_bytes / 1e9
        raise ConfigError(
            f"a KV pool of {gigabytes:.1f} GB and the buffers for max_num_seqs {engine.max_num_seqs} "
            f"do not fit {device}; lower gpu_memory_utilization, kv_cache_memory_bytes or max_num_seqs"
        ) from error
    return Rank(
        files=files,
        spec=spec,
        layout=layout,
        num_pages=num_pages,
        max_model_len=max_model_len,
        dtype=dtype,
        device=device,
        pool=pool,
        runner=runner,
    )


def _check_quantization(name: str, spec: ModelSpec, device: torch.device, dtype: str, tp_size: int) -> None:
    """Refuse what has no product of eight bits."""
    reason: str | None = None
    heads = spec.num_heads * spec.head_dim // tp_size
    if spec.experts is not None:
        reason = f"is not made for a mixture of experts ({spec.family}); leave it out"
    elif device.type == "cpu":
        reason = f"needs a Hopper GPU, and the device is {device}; leave it out, or use --device cuda"
    elif (lack := why_no_cuda_kernels()) is not None:
        reason = f"needs the CUDA kernels: {lack}"
    elif dtype != "bfloat16":
        reason = f"computes in bfloat16, and dtype is {dtype}; use --dtype bfloat16"
    elif any(n % MULTIPLE for n in (spec.hidden_size, spec.intermediate_size // tp_size, heads)):
        reason = (
            f"needs matrices of multiples of {MULTIPLE} on each rank; leave it out, or lower "
            "tensor_parallel_size"
        )
    if reason is not None:
        raise ConfigError(f"quantization {name} {reason}")


def _make_runner(
    decoder: Decoder, attention: AttentionBackend, pool: Tensor, engine: EngineConfig, sizes: AttentionSizes
) -> Runner:
    if decoder.device.type == "cpu" or why_no_cuda_kernels() is not None:
        return ModelRunner(decoder, attention, pool, engine.block_size)
    from disagg.engine.cuda_runner import CudaRunner

    return CudaRunner(
        decoder,
        attention,
        pool,
        engine.block_size,
        max_num_seqs=engine.max_num_seqs,
        max_step_tokens=pick_step_tokens(engine, decoder.device),
        max_page_indices=sizes.max_page_indices,
    )


def make_engine(
    rank: Rank,
    engine: EngineConfig,
    *,
    send: Callable[[bytes], None] | None = None,
    clock: Callable[[], float] = time.monotonic,
) -> Engine:
    """Make rank 0's engine.

    Args:
        rank: Rank 0's share.
        engine: The same configuration that it was loaded with.
        send: Hands an encoded plan to every other rank, whose runner runs it; None for a group of one.
        clock: Monotonic seconds.

    Raises:
        ConfigError: the limits contradict each other.
    """
    runner = rank.runner
    return Engine(
        runner=LeadingRunner(runner, engine.max_num_seqs, send) if send or not runner.depth else runner,
        cache=KvCache.make(rank.num_pages, engine.block_size, engine.prefix_cache),
        limits=Limits(
            max_num_seqs=engine.max_num_seqs,
            max_num_batched_tokens=pick_step_tokens(engine, rank.device),
            max_model_len=rank.max_model_len,
            vocab_size=rank.spec.vocab_size,
            num_pages=rank.num_pages,
            page_size=engine.block_size,
        ),
        eos_token_ids=rank.spec.eos_token_ids,
        clock=clock,
    )


def build_engine(
    model: ModelConfig, engine: EngineConfig, *, progress: Callable[[int, int], None] | None = None
) -> Engine:
    """Load a model and make its engine, all in this process.

    Raises:
        ConfigError: as `load_rank` and `make_engine`; also for a tensor-parallel size above 1.
    """
    if engine.tensor_parallel_size != 1:
        raise ConfigError(
            f"tensor_parallel_size {engine.tensor_parallel_size} needs one process a rank; use disagg serve"
        )
    return make_engine(load_rank(model, engine, progress=progress), engine)


def pick_device(name: str, rank: int = 0, ranks_here: int = 1) -> torch.device:
    """Where one rank runs: its own GPU where `auto` finds any, else the CPU.

    Args:
        name: `ModelConfig.device`.
        rank: Of the whole group.
        ranks_here: On this node; every node has as many, in order.

    Raises:
        ConfigError: there are too few GPUs here.
    """
    if name == "cpu" or (name == "auto" and not torch.cuda.is_available()):
        return torch.device("cpu")
    if not torch.cuda.is_available():
        raise ConfigError(f"device = {name!r}, but torch finds no GPU here")
    num_gpus = torch.cuda.device_count()
    if ranks_here > num_gpus and os.environ.get(MULTI_RANK) != "1":
        raise ConfigError(f"{ranks_here} ranks on one node need as many GPUs, but torch finds {num_gpus}")
    return torch.device("cuda", rank % num_gpus)


def pick_step_tokens(engine: EngineConfig, device: torch.device) -> int:
    """The token budget of a step: what was asked for, or what suits the device and holds every decode."""
    return engine.max_num_batched_tokens or max(STEP_TOKENS[device.type], engine.max_num_seqs)


def pick_max_model_len(model: ModelConfig, spec: ModelSpec, num_pages: int, page_size: int) -> int:
    """The longest prompt plus output: what was asked for, or what model and pool allow.

    Raises:
        ConfigError: more was asked for than they do, or the pool holds no page.
    """
    if num_pages < 1:
        raise ConfigError(
            "the KV pool must hold at least one page; raise kv_cache_memory_bytes or, where that is not set, "
            "gpu_memory_utilization, or free memory of the GPU"
        )
    # The newest token's KV is never stored.
    pool_len = num_pages * page_size + 1
    if model.max_model_len is None:
        return min(spec.max_position_embeddings, pool_len)
    if model.max_model_len > spec.max_position_embeddings:
        raise ConfigError(
            f"max_model_len {model.max_model_len} is more than the model's context of "
            f"{spec.max_position_embeddings}"
        )
    if model.max_model_len > pool_len:
        raise ConfigError(
            f"max_model_len {model.max_model_len} does not fit a KV pool of {num_pages} pages of "
            f"{page_size} tokens; raise kv_cache_memory_bytes"
        )
    return model.max_model_len


def _pick_kv_dtype(engine: EngineConfig, dtype: str, device: torch.device) -> str:
    """The type of KV pages."""
    if engine.kv_cache_dtype == "auto":
        return dtype
    if device.type == "cpu":
        raise ConfigError("kv_cache_dtype fp8 needs a Hopper GPU, and device is cpu; use auto")
    if (reason := why_no_cuda_kernels()) is not None:
        raise ConfigError(f"kv_cache_dtype fp8 needs kernels that do not run here: {reason}; use auto")
    if dtype == "float32":
        raise ConfigError("kv_cache_dtype fp8 is for dtype bfloat16 or float16, got float32; use auto")
    return FP8


def _pool_bytes(engine: EngineConfig, spec: ModelSpec, device: torch.device) -> int:
    if engine.kv_cache_memory_bytes is not None:
        return engine.kv_cache_memory_bytes
    if device.type == "cpu":
        return CPU_POOL_BYTES
    free, total = torch.cuda.mem_get_info(device)
    step = pick_step_tokens(engine, device) * spec.mlp_width * GPU_STEP_BYTES
    # Logits of every sequence, as float32 and in a few copies while they are filtered.
    step += engine.max_num_seqs * spec.vocab_size * 4 * 6
    return max(0, int(total * engine.gpu_memory_utilization) - (total - free) - step - GPU_FIXED_BYTES)


def _agree(tp: TensorParallel, num_pages: int, device: torch.device) -> int:
    """The fewest pages of any rank: a page id means the same page on all of them."""
    counts = torch.zeros(tp.size, dtype=torch.int64, device=device)
    counts[tp.rank] = num_pages
    return int(tp.all_reduce(counts).min())


def _make_pool(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    if device.type == "cpu":
        # Untouched memory costs nothing until a page is written.
        return torch.empty(shape, dtype=dtype)
    return torch.zeros(shape, dtype=dtype, device=device)
