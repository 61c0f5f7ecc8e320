"""Small GGUF files of random weights, written with the `gguf` library as llama.cpp's converter would."""

import json
from pathlib import Path
from typing import Any

import numpy as np
from gguf import GGMLQuantizationType, GGUFWriter
from gguf.quants import dequantize, quantize
from numpy.typing import NDArray

from support.checkpoints import CHAT_TEMPLATE, END, END_OF_TEXT, SPECIAL_TOKENS, make_weights

CONFIG: dict[str, Any] = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "vocab_size": 320,
    "max_position_embeddings": 256,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "tie_word_embeddings": True,
}

_NAMES = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
}


def write_gguf(
    path: Path,
    family: str = "llama",
    *,
    quantization: str = "F32",
    tokenizer_json: str,
    pre_tokenizer: str = "gpt2",
    metadata: dict[str, Any] | None = None,
    extra_tensors: dict[str, NDArray[np.float32]] | None = None,
    seed: int = 0,
    **config: Any,
) -> dict[str, NDArray[np.float32]]:
    """Write `path` and return what its tensors are worth, under Hugging Face's names.

    Args:
        path: The file.
        family: `llama`, `qwen2` or `qwen3`.
        quantization: Of matrices; vectors are F32.
        tokenizer_json: A byte-level BPE vocabulary.
        pre_tokenizer: llama.cpp's name of how text is cut.
        metadata: More keys: str, int, float or bool.
        extra_tensors: More tensors, F32.
        seed: Of the weights.
        config: Fields of `CONFIG` to replace.
    """
    merged = {**CONFIG, "model_type": family, **config}
    writer = GGUFWriter(path, family)
    _add_config(writer, merged)
    _add_vocabulary(writer, json.loads(tokenizer_json), pre_tokenizer)
    for key, value in (metadata or {}).items():
        {str: writer.add_string, int: writer.add_uint32, float: writer.add_float32, bool: writer.add_bool}[
            type(value)
        ](key, value)
    for name, tensor in (extra_tensors or {}).items():
        writer.add_tensor(name, tensor)
    heads = {"q_proj": merged["num_attention_heads"], "k_proj": merged["num_key_value_heads"]}
    worth = {}
    for name, tensor in make_weights(merged, seed).items():
        kind = GGMLQuantizationType[quantization if tensor.ndim > 1 else "F32"]
        rotated = heads.get(name.split(".")[-2], 0) if family == "llama" else 0
        # Quantized as llama.cpp stores it; what comes back is in Hugging Face's order.
        stored = quantize(_to_pairs(tensor, rotated), kind)
        writer.add_tensor(_gguf_name(name), stored, raw_dtype=kind)
        worth[name] = _to_halves(dequantize(stored, kind), rotated)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return worth


def _add_config(writer: GGUFWriter, config: dict[str, Any]) -> None:
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_key_length(config["head_dim"])
    writer.add_value_length(config.get("value_length", config["head_dim"]))
    writer.add_rope_dimension_count(config["head_dim"])
    writer.add_rope_freq_base(config["rope_theta"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])


def _add_vocabulary(writer: GGUFWriter, tokenizer: dict[str, Any], pre_tokenizer: str) -> None:
    vocab = tokenizer["model"]["vocab"]
    merges = tokenizer["model"]["merges"]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre_tokenizer)
    writer.add_token_list(sorted(vocab, key=vocab.__getitem__))
    writer.add_token_types([3 if token in SPECIAL_TOKENS else 1 for token in sorted(vocab, key=vocab.get)])
    writer.add_token_merges([m if isinstance(m, str) else " ".join(m) for m in merges])
    writer.add_bos_token_id(END_OF_TEXT)
    writer.add_eos_token_id(END)
    writer.add_add_bos_token(False)
    writer.add_chat_template(CHAT_TEMPLATE)


def _gguf_name(name: str) -> str:
    stem, kind = name.rsplit(".", 1)
    if stem.startswith("model.layers."):
        _, _, layer, rest = stem.split(".", 3)
        return f"blk.{layer}.{_NAMES[rest]}.{kind}"
    return f"{_NAMES[stem]}.{kind}"


def _to_pairs(tensor: NDArray[np.float32], heads: int) -> NDArray[np.float32]:
    """Rows i and i + n/2 of each head side by side, which is llama.cpp's order."""
    if not heads:
        return tensor
    return np.ascontiguousarray(tensor.reshape(heads, 2, -1, tensor.shape[1]).swapaxes(1, 2)).reshape(
        tensor.shape
    )


def _to_halves(tensor: NDArray[np.float32], heads: int) -> NDArray[np.float32]:
    if not heads:
        return tensor
    return tensor.reshape(heads, -1, 2, tensor.shape[1]).swapaxes(1, 2).reshape(tensor.shape)
