"""GGUF → a folder in Hugging Face's layout: config, tokenizer and dequantized safetensors.

Tensors go one after another, a few rows at a time, so the memory needed does not depend on the
model's size. Quantized types become float32, which is exactly what dequantization gives; float32,
float16 and bfloat16 are copied as they are.
"""

import json
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from msgspec import Struct
from numpy.typing import NDArray

from disagg.checkpoint.gguf_file import GgufFile, GgufTensor
from disagg.checkpoint.tensors import SINGLE_NAME, TensorSpec, TensorWriter
from disagg.checkpoint.vocabulary import write_tokenizer
from disagg.errors import ConfigError

CONVERTER_VERSION = 1
"""Part of the cache's key: raise it whenever what is written changes."""

Progress = Callable[[int, int], None]

# Dequantization makes a few temporaries of this size; small enough for the processor's cache.
CHUNK_ELEMENTS = 256 * 1024

_PLAIN = {0: "F32", 1: "F16", 30: "BF16"}


class Architecture(Struct, frozen=True):
    """What differs between the GGUF forms of the families."""

    model_type: str
    class_name: str
    rotated_pairs: bool = False
    """llama.cpp rotates neighbours and not halves, so rows of q and k come permuted."""
    qkv_bias: bool = False
    qk_norm: bool = False
    end_tokens: tuple[str, ...] = ()
    """End of sequence besides those the metadata names."""


ARCHITECTURES = {
    "llama": Architecture("llama", "LlamaForCausalLM", rotated_pairs=True),
    "qwen2": Architecture("qwen2", "Qwen2ForCausalLM", qkv_bias=True, end_tokens=("<|endoftext|>",)),
    "qwen3": Architecture("qwen3", "Qwen3ForCausalLM", qk_norm=True, end_tokens=("<|endoftext|>",)),
}


class _Move(Struct, frozen=True):
    """One tensor's way from the GGUF to safetensors."""

    source: GgufTensor
    target: TensorSpec
    rotated_heads: int = 0
    """Heads whose rows must be put back in order; 0 where there is nothing to do."""


def convert_gguf(source: Path, folder: Path, progress: Progress | None = None) -> None:
    """Convert the GGUF file `source` into the existing, empty `folder`.

    The configuration is written last. `progress` is told (bytes written, bytes in all).

    Raises:
        ConfigError: the file is damaged, or its architecture, quantization, rope scaling or
            vocabulary is not supported.
    """
    with GgufFile(source) as file:
        architecture = _architecture(file)
        config = _config(file, architecture)
        moves = _plan(file, architecture, config)
        write_tokenizer(file.metadata, folder, source)
        _write_weights(file, moves, folder / SINGLE_NAME, progress)
        _write_json(folder / "generation_config.json", _generation_config(file.metadata, architecture))
        _write_json(folder / "config.json", config)


def output_bytes(source: Path) -> int:
    """Bytes of weights that converting `source` writes."""
    with GgufFile(source) as file:
        architecture = _architecture(file)
        return sum(move.target.num_bytes for move in _plan(file, architecture, _config(file, architecture)))


def _architecture(file: GgufFile) -> Architecture:
    name = file.metadata.get("general.architecture")
    found = ARCHITECTURES.get(str(name))
    if found is None:
        known = ", ".join(ARCHITECTURES)
        raise ConfigError(f"{file.path} has the architecture {name!r}; supported are {known}")
    if int(file.metadata.get("split.count", 1)) > 1:
        raise ConfigError(f"{file.path} is one part of a split GGUF; merge the parts into one file first")
    return found


def _config(file: GgufFile, architecture: Architecture) -> dict[str, Any]:
    """config.json, from the metadata and the tensors that are there."""
    prefix = str(file.metadata["general.architecture"])

    def get(key: str, default: Any = None) -> Any:
        value = file.metadata.get(f"{prefix}.{key}", default)
        if value is None:
            raise ConfigError(f"{file.path} lacks the metadata {prefix}.{key}")
        return value

    def size(key: str, default: int | None = None) -> int:
        value = get(key, default)
        if not isinstance(value, int) or value < 1:
            raise ConfigError(f"{file.path} has {prefix}.{key} {value!r:.40}, not a number above 0")
        return value

    hidden_size, num_heads = size("embedding_length"), size("attention.head_count")
    head_dim = size("attention.key_length", hidden_size // num_heads)
    if any(size(key, head_dim) != head_dim for key in ("rope.dimension_count", "attention.value_length")):
        raise ConfigError(f"{file.path} rotates or values a part of a head only, which is not supported")
    embedding = file.tensors.get("token_embd.weight")
    if embedding is None:
        raise ConfigError(f"{file.path} lacks the tensor token_embd.weight")
    token_ids = {
        f"{name}_token_id": file.metadata[f"tokenizer.ggml.{key}_token_id"]
        for name, key in (("bos", "bos"), ("eos", "eos"), ("pad", "padding"))
        if f"tokenizer.ggml.{key}_token_id" in file.metadata
    }
    return {
        "architectures": [architecture.class_name],
        "model_type": architecture.model_type,
        "hidden_size": hidden_size,
        "intermediate_size": size("feed_forward_length"),
        "num_hidden_layers": size("block_count"),
        "num_attention_heads": num_heads,
        "num_key_value_heads": size("attention.head_count_kv", num_heads),
        "head_dim": head_dim,
        "vocab_size": embedding.shape[0],
        "max_position_embeddings": size("context_length"),
        "rms_norm_eps": get("attention.layer_norm_rms_epsilon"),
        "rope_theta": get("rope.freq_base", 10000.0),
        "rope_scaling": _rope_scaling(file, prefix, head_dim),
        "tie_word_embeddings": "output.weight" not in file.tensors,
        "hidden_act": "silu",
        "attention_bias": False,
        "mlp_bias": False,
        "dtype": _stored_dtype(file),
        **token_ids,
    }


def _stored_dtype(file: GgufFile) -> str:
    """The type of the largest tensors as written; norms are float32 in every file."""
    kinds = {_PLAIN.get(tensor.type_id, "F32") for tensor in file.tensors.values() if len(tensor.shape) > 1}
    return {"F16": "float16", "BF16": "bfloat16"}.get(kinds.pop() if len(kinds) == 1 else "F32", "float32")


def _rope_scaling(file: GgufFile, prefix: str, head_dim: int) -> dict[str, Any] | None:
    kind = file.metadata.get(f"{prefix}.rope.scaling.type", "none")
    if kind not in ("none", "linear"):
        raise ConfigError(f"{file.path} scales rope by {kind!r}; supported are linear and llama3")
    if kind == "linear":
        return {"rope_type": "linear", "factor": file.metadata[f"{prefix}.rope.scaling.factor"]}
    factors = file.tensors.get("rope_freqs.weight")
    if factors is None:
        return None
    theta = float(file.metadata.get(f"{prefix}.rope.freq_base", 10000.0))
    stored = np.frombuffer(file.read(factors.offset, 4 * math.prod(factors.shape)), np.float32)
    return _recover_llama3(stored, theta, head_dim, file.path)


def _recover_llama3(stored: NDArray[np.float32], theta: float, head_dim: int, source: Path) -> dict[str, Any]:
    """Find the parameters behind Llama 3's stored frequency divisors.

    Every published Llama 3 has the same three of four, and the fourth is the largest divisor; that
    the four give back what is stored is checked.
    """
    factor, low, high, original = float(stored.max()), 1.0, 4.0, 8192
    wavelength = 2 * np.pi * theta ** (np.arange(0, head_dim, 2) / head_dim)
    smooth = np.clip((original / wavelength - low) / (high - low), 0.0, 1.0)
    expected = 1.0 / ((1.0 - smooth) / factor + smooth)
    if stored.shape != expected.shape or not np.allclose(stored, expected, rtol=1e-3):
        raise ConfigError(f"{source} scales rope by its own frequencies, which is not supported")
    return {
        "rope_type": "llama3",
        "factor": factor,
        "low_freq_factor": low,
        "high_freq_factor": high,
        "original_max_position_embeddings": original,
    }


def _generation_config(metadata: dict[str, Any], architecture: Architecture) -> dict[str, Any]:
    ends = [metadata.get(f"tokenizer.ggml.{key}_token_id") for key in ("eos", "eot", "eom")]
    tokens: list[str] = metadata["tokenizer.ggml.tokens"]
    ends += [tokens.index(token) for token in architecture.end_tokens if token in tokens]
    config: dict[str, Any] = {"eos_token_id": list(dict.fromkeys(end for end in ends if end is not None))}
    for name, key in (("bos", "bos"), ("pad", "padding")):
        if f"tokenizer.ggml.{key}_token_id" in metadata:
            config[f"{name}_token_id"] = metadata[f"tokenizer.ggml.{key}_token_id"]
    return config


_LAYER_NAMES = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}


def _names(architecture: Architecture, num_layers: int, tied: bool) -> Iterator[tuple[str, str]]:
    """(GGUF name, Hugging Face name) of every tensor the family needs, in a model's own order."""
    yield "token_embd.weight", "model.embed_tokens.weight"
    for i in range(num_layers):
        for ours, theirs in _LAYER_NAMES.items():
            if ours.endswith(("q_norm", "k_norm")) and not architecture.qk_norm:
                continue
            yield f"blk.{i}.{ours}.weight", f"model.layers.{i}.{theirs}.weight"
            if architecture.qkv_bias and ours in ("attn_q", "attn_k", "attn_v"):
                yield f"blk.{i}.{ours}.bias", f"model.layers.{i}.{theirs}.bias"
    yield "output_norm.weight", "model.norm.weight"
    if not tied:
        yield "output.weight", "lm_head.weight"


def _plan(file: GgufFile, architecture: Architecture, config: dict[str, Any]) -> list[_Move]:
    moves = []
    rotated = {"attn_q": config["num_attention_heads"], "attn_k": config["num_key_value_heads"]}
    names = _names(architecture, config["num_hidden_layers"], config["tie_word_embeddings"])
    for ours, theirs in names:
        tensor = file.tensors.get(ours)
        if tensor is None:
            raise ConfigError(f"{file.path} lacks the tensor {ours}")
        target = TensorSpec(theirs, _PLAIN.get(tensor.type_id, "F32"), tensor.shape)
        kind = ours.split(".")[2] if ours.startswith("blk.") else ""
        heads = rotated.get(kind, 0) if architecture.rotated_pairs else 0
        moves.append(_Move(tensor, target, heads))
    unused = file.tensors.keys() - {move.source.name for move in moves} - {"rope_freqs.weight"}
    if unused:
        raise ConfigError(
            f"{file.path} has tensors the family does not know: {', '.join(sorted(unused)[:3])}"
        )
    return moves


def _write_weights(file: GgufFile, moves: list[_Move], path: Path, progress: Progress | None) -> None:
    total, done = sum(move.target.num_bytes for move in moves), 0
    writer = TensorWriter(path, [move.target for move in moves])
    try:
        for move in moves:
            for piece in _pieces(file, move):
                writer.write(np.ascontiguousarray(piece).data.cast("B"))
                done += piece.nbytes
                if progress is not None:
                    progress(done, total)
        writer.finish()
    finally:
        writer.close()


def _pieces(file: GgufFile, move: _Move) -> Iterator[NDArray[Any]]:
    """The rows of one tensor as they are to be written, some at a time."""
    num_columns = move.source.shape[-1]
    num_rows = math.prod(move.source.shape[:-1])
    row_bytes = _row_bytes(file, move.source)
    step = max(1, CHUNK_ELEMENTS // num_columns)
    if move.rotated_heads:
        if num_rows % (2 * move.rotated_heads):
            raise ConfigError(
                f"{file.path}: {move.source.name} has {num_rows} rows, not whole pairs of heads"
            )
        # Rows are put in order within a head, so a piece is a number of whole heads.
        head_rows = num_rows // move.rotated_heads
        step = max(1, step // head_rows) * head_rows
    for row in range(0, num_rows, step):
        count = min(step, num_rows - row)
        offset = move.source.offset + row * row_bytes
        raw = np.frombuffer(file.read(offset, count * row_bytes), np.uint8).reshape(count, row_bytes)
        file.release(offset, count * row_bytes)
        if move.rotated_heads:
            raw = _unrotate(raw, head_rows)
        yield _dequantize(file, move.source, raw)


def _unrotate(rows: NDArray[np.uint8], head_rows: int) -> NDArray[np.uint8]:
    """Put rows of whole heads back: pairs (0, 1), (2, 3), … become (0, n/2), (1, n/2 + 1), …

    Whole rows move, so it makes no difference that they are still quantized.
    """
    pairs = rows.reshape(-1, head_rows // 2, 2, rows.shape[1])
    return np.ascontiguousarray(pairs.swapaxes(1, 2)).reshape(rows.shape)


def _row_bytes(file: GgufFile, tensor: GgufTensor) -> int:
    # Not at the top: a router that finds the cache filled needs none of it.
    from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

    try:
        block, block_bytes = GGML_QUANT_SIZES[GGMLQuantizationType(tensor.type_id)]
    except (ValueError, KeyError) as e:
        raise ConfigError(f"{file.path}: {tensor.name} has the unknown type {tensor.type_id}") from e
    if tensor.shape[-1] % block:
        raise ConfigError(f"{file.path}: rows of {tensor.name} are not whole blocks of {block}")
    return int(tensor.shape[-1] // block * block_bytes)


def _dequantize(file: GgufFile, tensor: GgufTensor, raw: NDArray[np.uint8]) -> NDArray[Any]:
    if tensor.type_id in _PLAIN:
        return raw
    from gguf import GGMLQuantizationType
    from gguf.quants import dequantize

    kind = GGMLQuantizationType(tensor.type_id)
    try:
        values: NDArray[np.float32] = dequantize(raw, kind)
    except NotImplementedError as e:
        raise ConfigError(
            f"{file.path}: {tensor.name} is quantized as {kind.name}, which is not supported"
        ) from e
    return values


def _write_json(path: Path, value: dict[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2))
