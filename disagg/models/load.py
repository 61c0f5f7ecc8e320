"""Building a decoder: planned parameters are allocated once and filled a few megabytes at a time."""

from collections.abc import Callable
from itertools import accumulate
from math import prod
from typing import Literal

import torch
from msgspec.structs import replace
from torch import Tensor

from disagg.checkpoint import ModelFiles, TensorReader, read_index
from disagg.errors import ConfigError
from disagg.layers import ops
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
        tensors = fill(parameters, source, whole_shapes(spec), torch.device(device), dtype, progress)
    # In place, so it takes no more memory.
    return _assemble(spec, tp, {key: _pack(key, tensor) for key, tensor in tensors.items()})


def _pack(key: str, tensor: Tensor) -> Tensor:
    if key.endswith(("gate_up", "gate_up_bias")):
        return ops.pack_gate_up(tensor)
    return ops.pack_linear(tensor) if tensor.ndim == 2 else tensor


def _assemble(spec: ModelSpec, tp: TensorParallel, tensors: dict[str, Tensor]) -> Decoder:
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
            shapes[piece.name] = (len(piece.rows), *parameter.shape[1:])
    return shapes


def fill(
    parameters: list[Parameter],
    source: WeightSource,
    whole_shapes: dict[str, tuple[int, ...]],
    device: torch.device,
    dtype: torch.dtype,
    progress: Progress | None = None,
) -> dict[str, Tensor]:
    """Allocate and fill every parameter; keys are the parameters'."""
    # Page-locked, the copy to a GPU runs at the bus's speed.
    buffer = torch.empty(CHUNK_BYTES, dtype=torch.uint8, pin_memory=device.type == "cuda")
    tensors = _allocate(parameters, device, dtype)
    total = sum(tensor.nbytes for tensor in tensors.values())
    done = 0
    for parameter in parameters:
        tensor = tensors[parameter.key]
        row = 0
        for piece in parameter.pieces:
            target = tensor[row : row + len(piece.rows)]
            _copy_piece(piece, source, whole_shapes[piece.name], target, buffer)
            row += len(piece.rows)
        done += tensor.nbytes
        if progress is not None:
            progress(done, total)
    return tensors


def _allocate(parameters: list[Parameter], device: torch.device, dtype: torch.dtype) -> dict[str, Tensor]:
    """Room for every parameter in one piece of memory, in their order."""
    sizes = [prod(parameter.shape) * dtype.itemsize for parameter in parameters]
    begins = list(accumulate((-(-size // ALIGNMENT) * ALIGNMENT for size in sizes), initial=0))
    memory = allocate(begins[-1], device)
    return {
        parameter.key: memory[begin : begin + size].view(dtype).view(parameter.shape)
        for parameter, begin, size in zip(parameters, begins, sizes, strict=False)
    }


def _copy_piece(
    piece: Piece, source: WeightSource, shape: tuple[int, ...], target: Tensor, buffer: Tensor
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
        target[begin : begin + step].copy_(chunk)
