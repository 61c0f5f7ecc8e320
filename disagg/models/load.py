"""Building a decoder: planned parameters are allocated once and filled a few megabytes at a time."""

from collections.abc import Callable
from itertools import accumulate
from math import prod
from typing import Any, Literal

import torch
from msgspec.structs import replace
from torch import Tensor

from disagg.checkpoint import ModelFiles, TensorReader, read_index
from disagg.errors import ConfigError
from disagg.layers import ops
from disagg.layers.fp8 import FP8, ScaledMatrix, Weight, scale_rows
from disagg.layers.memory import allocate
from disagg.layers.rope import cos_sin_cache
from disagg.models.decoder import Decoder, LayerWeights
from disagg.models.parameters import Parameter, Piece, check_tensor_parallel, plan_parameters
from disagg.models.sources import CheckpointSource, NoiseSource, WeightSource
from disagg.models.spec import ModelSpec
from disagg.parallel import TensorParallel

Progress = Callable[[int, int], None]

# Small enough to stay in the processor's cache between the read and the copy into place.
CHUNK_BYTES = 4 * 1024 * 1024

# Vector loads on any device want less.
ALIGNMENT = 256


def load_model(
    files: ModelFiles,
    spec: ModelSpec,
    *,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
    tp: TensorParallel | None = None,
    load_format: Literal["auto", "dummy"] = "auto",
    seed: int = 0,
    quantization: Literal["fp8"] | None = None,
    progress: Progress | None = None,
) -> Decoder:
    """Load one rank's share of a model.

    Args:
        files: The checkpoint.
        spec: Of the same checkpoint. A smaller `max_position_embeddings` makes a smaller rope table.
        device: Where the weights go.
        dtype: Into which they are converted, rounding to nearest.
        tp: This rank's group; None is a group of one.
        load_format: `dummy` reads no weights and makes random ones.
        seed: Of dummy weights, which are the same for every tensor-parallel size.
        quantization: `fp8` rounds the layers' matrices to e4m3, with a scale for each row of a rank's part;
            no mixture of experts.
        progress: Told (bytes placed, bytes in all) of this rank.

    Raises:
        ConfigError: the tensor-parallel size does not divide the model, or a tensor is missing, cut
            short or of an unexpected shape or type.
    """
    tp = tp or TensorParallel.single()
    check_tensor_parallel(spec, tp.size)
    parameters = plan_parameters(spec, tp.rank, tp.size)
    with TensorReader() as reader:
        source: WeightSource
        if load_format == "dummy":
            source = NoiseSource(seed, spec.initializer_range)
        else:
            source = CheckpointSource(read_index(files.path), reader)
        shapes, quantized = whole_shapes(spec), quantization is not None
        tensors = fill(parameters, source, shapes, torch.device(device), dtype, progress, quantized=quantized)
    # In place, so it takes no more memory.
    packed = {key: _pack(key, weight, quantized) for key, weight in tensors.items()}
    return _assemble(spec, tp, packed)


def _pack(key: str, weight: Weight, quantized: bool) -> Weight:
    if isinstance(weight, ScaledMatrix):
        return weight
    if key.endswith(("gate_up", "gate_up_bias")) and weight.ndim < 3 and not quantized:
        return ops.pack_gate_up(weight)
    return weight if weight.ndim == 1 else ops.pack_linear(weight)


def _assemble(spec: ModelSpec, tp: TensorParallel, tensors: dict[str, Any]) -> Decoder:
    layers = []
    for i in range(spec.num_layers):
        prefix = f"layers.{i}."
        fields = {field: tensors.get(prefix + field) for field in LayerWeights.__struct_fields__}
        layers.append(LayerWeights(**fields))  # type: ignore[arg-type]  # the plan has all required ones
    embedding = tensors["embedding"]
    return Decoder(
        spec,
        tp,
        embedding=embedding,
        layers=layers,
        final_norm=tensors["final_norm"],
        lm_head=embedding if spec.tie_word_embeddings else tensors["lm_head"],
        cos_sin=cos_sin_cache(spec.rope, spec.head_dim, spec.max_position_embeddings, embedding.device),
    )


def whole_shapes(spec: ModelSpec) -> dict[str, tuple[int, ...]]:
    """The shape that every tensor of the checkpoint must have: what a single rank would take of it."""
    shapes: dict[str, tuple[int, ...]] = {}
    for parameter in plan_parameters(spec, 0, 1):
        for piece in parameter.pieces:
            shapes[piece.name] = (len(piece.rows), *parameter.shape[1:][-1:])
    return shapes


def fill(
    parameters: list[Parameter],
    source: WeightSource,
    whole_shapes: dict[str, tuple[int, ...]],
    device: torch.device,
    dtype: torch.dtype,
    progress: Progress | None = None,
    *,
    quantized: bool = False,
) -> dict[str, Weight]:
    """Allocate and fill every parameter, by its key; `quantized` scales the layers' matrices."""
    # Page-locked, the copy to a GPU runs at the bus's speed.
    buffer = torch.empty(CHUNK_BYTES, dtype=torch.uint8, pin_memory=device.type == "cuda")
    is_scaled = {parameter.key: quantized and parameter.in_layer for parameter in parameters}
    tensors = _allocate(parameters, device, [FP8 if is_scaled[p.key] else dtype for p in parameters])
    weights: dict[str, Weight] = dict(tensors)
    total = sum(tensor.nbytes for tensor in tensors.values())
    done = 0
    for parameter in parameters:
        tensor = tensors[parameter.key]
        rows: Weight = tensor.flatten(0, -2) if tensor.ndim > 1 else tensor
        if is_scaled[parameter.key]:
            rows = weights[parameter.key] = ScaledMatrix(tensor, torch.empty(len(tensor), device=device))
        row = 0
        for piece in parameter.pieces:
            target = _rows(rows, row, row + len(piece.rows))
            _copy_piece(piece, source, whole_shapes[piece.name], target, buffer)
            row += len(piece.rows)
        done += tensor.nbytes
        if progress is not None:
            progress(done, total)
    return weights


def _rows(weight: Weight, begin: int, end: int) -> Weight:
    if isinstance(weight, ScaledMatrix):
        return ScaledMatrix(weight.values[begin:end], weight.scales[begin:end])
    return weight[begin:end]


def _place(chunk: Tensor, target: Weight) -> None:
    if not isinstance(target, ScaledMatrix):
        target.copy_(chunk)
        return
    for into, scaled in zip(target, scale_rows(chunk.to(target.values.device)), strict=True):
        into.copy_(scaled)


def _allocate(
    parameters: list[Parameter], device: torch.device, dtypes: list[torch.dtype]
) -> dict[str, Tensor]:
    """Room for every parameter in one piece of memory, in their order."""
    sizes = [prod(p.shape) * dtype.itemsize for p, dtype in zip(parameters, dtypes, strict=True)]
    begins = list(accumulate((-(-size // ALIGNMENT) * ALIGNMENT for size in sizes), initial=0))
    memory = allocate(begins[-1], device)
    return {
        parameter.key: memory[begin : begin + size].view(dtype).view(parameter.shape)
        for parameter, dtype, begin, size in zip(parameters, dtypes, begins, sizes, strict=False)
    }


def _copy_piece(
    piece: Piece, source: WeightSource, shape: tuple[int, ...], target: Weight, buffer: Tensor
) -> None:
    """Bring a piece into place through `buffer`, converting on the way."""
    dtype = source.dtype(piece.name)
    row_length = prod(target.shape[1:])
    step = buffer.nbytes // (row_length * dtype.itemsize)
    if step == 0:
        raise ConfigError(f"{piece.name} has rows of {row_length} elements, more than can be loaded")
    for begin in range(0, len(piece.rows), step):
        part = replace(piece, rows=piece.rows[begin : begin + step])
        num_bytes = len(part.rows) * row_length * dtype.itemsize
        chunk = buffer[:num_bytes].view(dtype).view(len(part.rows), *target.shape[1:])
        source.read(part, shape, chunk)
        _place(chunk, _rows(target, begin, begin + step))
