"""Tiny random checkpoints on disk, in Hugging Face's layout, made without torch or transformers.

`make_checkpoint(folder, family)` writes config.json, generation_config.json, tokenizer.json,
tokenizer_config.json and (sharded) safetensors, which `disagg` and transformers both load.
"""

import json
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors.numpy import save_file
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers

SPECIAL_TOKENS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
END_OF_TEXT, START, END = range(3)

CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)

_CORPUS = (
    "the quick brown fox jumps over the lazy dog and runs through the forest in the morning",
    "a large language model reads a prompt and writes the next token, then the next one again",
    "def main(argv):\n    for index in range(10):\n        print(index, argv[index])\n",
    "pages of keys and values move between two workers while the next chunk is computed",
    "1234567890 + 98765 = ?  (maybe 42)  [x, y, z] {key: value} <tag/> 'quoted' \"text\"",
)

_CONFIGS: dict[str, dict[str, Any]] = {
    "llama": {"model_type": "llama", "architectures": ["LlamaForCausalLM"]},
    "llama3": {
        "model_type": "llama",
        "architectures": ["LlamaForCausalLM"],
        "rope_theta": 500000.0,
        "rope_scaling": {
            "rope_type": "llama3",
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 64,
        },
        "tie_word_embeddings": False,
    },
    "llama_linear": {
        "model_type": "llama",
        "architectures": ["LlamaForCausalLM"],
        "rope_scaling": {"rope_type": "linear", "factor": 4.0},
        "attention_bias": True,
        "mlp_bias": True,
    },
    "mistral": {
        "model_type": "mistral",
        "architectures": ["MistralForCausalLM"],
        "sliding_window": None,
        "tie_word_embeddings": False,
    },
    "qwen2": {"model_type": "qwen2", "architectures": ["Qwen2ForCausalLM"]},
    "qwen3": {
        "model_type": "qwen3",
        "architectures": ["Qwen3ForCausalLM"],
        "head_dim": 32,
        "tie_word_embeddings": False,
    },
    "qwen3_moe": {
        "model_type": "qwen3_moe",
        "architectures": ["Qwen3MoeForCausalLM"],
        "head_dim": 32,
        "tie_word_embeddings": False,
        "num_experts": 12,
        "num_experts_per_tok": 3,
        "moe_intermediate_size": 96,
        "norm_topk_prob": True,
        "decoder_sparse_step": 1,
        "mlp_only_layers": [],
    },
}

FAMILIES = tuple(_CONFIGS)

_SHAPE: dict[str, Any] = {
    "hidden_size": 192,
    "intermediate_size": 384,
    "num_hidden_layers": 3,
    "num_attention_heads": 12,
    "num_key_value_heads": 6,
    "vocab_size": 320,
    "max_position_embeddings": 512,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "hidden_act": "silu",
    "tie_word_embeddings": True,
    "bos_token_id": END_OF_TEXT,
    "eos_token_id": END,
    "torch_dtype": "float32",
}


def make_checkpoint(
    folder: Path, family: str = "llama", *, seed: int = 0, max_shard_bytes: int | None = None, **config: Any
) -> Path:
    """Write a random checkpoint of `family` into `folder` (made if missing) and return it.

    Heads are 12 with 6 KV heads, so that tensor-parallel sizes 1, 2, 3 and 6 work. Weights are
    float32 and wide enough that greedy output is not one token repeated.

    Args:
        folder: Where the files go.
        family: One of `FAMILIES`.
        seed: Of the weights.
        max_shard_bytes: Split the weights over several files with an index.
        config: Fields of config.json to replace, for example `num_hidden_layers=2`.
    """
    merged = {**_SHAPE, **_CONFIGS[family], **config}
    folder.mkdir(parents=True, exist_ok=True)
    _write_json(folder / "config.json", merged)
    _write_json(
        folder / "generation_config.json",
        {"bos_token_id": END_OF_TEXT, "eos_token_id": [END, END_OF_TEXT], "do_sample": False},
    )
    write_tokenizer(folder, merged["vocab_size"])
    _write_weights(folder, make_weights(merged, seed), max_shard_bytes)
    return folder


def make_weights(config: dict[str, Any], seed: int) -> dict[str, NDArray[np.float32]]:
    """Random tensors under Hugging Face's names for a `config`, drawn in the order of their names."""
    rng = np.random.default_rng(seed)
    weights: dict[str, NDArray[np.float32]] = {}
    for name, shape in sorted(_shapes(config).items()):
        noise = rng.standard_normal(shape, dtype=np.float32)
        # Matrices keep the scale of their input; norms scatter around one; biases are small.
        if name.endswith("norm.weight"):
            weights[name] = 1.0 + 0.2 * noise
        elif name.endswith(".bias"):
            weights[name] = 0.2 * noise
        else:
            weights[name] = noise * np.float32(1.5 / shape[-1] ** 0.5)
    return weights


def write_tokenizer(folder: Path, vocab_size: int = 320) -> None:
    """Write a byte-level BPE tokenizer with ChatML's special tokens and its chat template."""
    (folder / "tokenizer.json").write_text(_tokenizer_json(vocab_size))
    _write_json(
        folder / "tokenizer_config.json",
        {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "bos_token": SPECIAL_TOKENS[END_OF_TEXT],
            "eos_token": SPECIAL_TOKENS[END],
            "pad_token": SPECIAL_TOKENS[END_OF_TEXT],
            "add_bos_token": False,
            "clean_up_tokenization_spaces": False,
            "chat_template": CHAT_TEMPLATE,
        },
    )


def _shapes(config: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    """Every tensor of a checkpoint and its shape."""
    hidden, inner = config["hidden_size"], config["intermediate_size"]
    head_dim = config.get("head_dim") or hidden // config["num_attention_heads"]
    q, kv = config["num_attention_heads"] * head_dim, config["num_key_value_heads"] * head_dim
    shapes: dict[str, tuple[int, ...]] = {
        "model.embed_tokens.weight": (config["vocab_size"], hidden),
        "model.norm.weight": (hidden,),
    }
    if not config["tie_word_embeddings"]:
        shapes["lm_head.weight"] = (config["vocab_size"], hidden)
    for i in range(config["num_hidden_layers"]):
        layer = f"model.layers.{i}."
        shapes |= {
            layer + "input_layernorm.weight": (hidden,),
            layer + "post_attention_layernorm.weight": (hidden,),
            layer + "self_attn.q_proj.weight": (q, hidden),
            layer + "self_attn.k_proj.weight": (kv, hidden),
            layer + "self_attn.v_proj.weight": (kv, hidden),
            layer + "self_attn.o_proj.weight": (hidden, q),
        }
        mlps = [f"{layer}mlp."]
        if config["model_type"] == "qwen3_moe":
            inner, experts = config["moe_intermediate_size"], config["num_experts"]
            shapes[layer + "mlp.gate.weight"] = (experts, hidden)
            mlps = [f"{layer}mlp.experts.{expert}." for expert in range(experts)]
        for mlp in mlps:
            shapes |= {
                mlp + "gate_proj.weight": (inner, hidden),
                mlp + "up_proj.weight": (inner, hidden),
                mlp + "down_proj.weight": (hidden, inner),
            }
        if config["model_type"] == "qwen2" or config.get("attention_bias"):
            shapes |= {f"{layer}self_attn.{p}_proj.bias": (n,) for p, n in (("q", q), ("k", kv), ("v", kv))}
        if config.get("attention_bias"):
            shapes[layer + "self_attn.o_proj.bias"] = (hidden,)
        if config.get("mlp_bias"):
            shapes |= {
                f"{layer}mlp.{p}_proj.bias": (n,)
                for p, n in (("gate", inner), ("up", inner), ("down", hidden))
            }
        if config["model_type"].startswith("qwen3"):
            shapes |= {f"{layer}self_attn.{p}_norm.weight": (head_dim,) for p in "qk"}
    return shapes


def _write_weights(
    folder: Path, weights: dict[str, NDArray[np.float32]], max_shard_bytes: int | None
) -> None:
    shards: list[dict[str, NDArray[np.float32]]] = [{}]
    for name, tensor in weights.items():
        held = sum(t.nbytes for t in shards[-1].values())
        if max_shard_bytes is not None and held and held + tensor.nbytes > max_shard_bytes:
            shards.append({})
        shards[-1][name] = tensor
    if len(shards) == 1:
        save_file(shards[0], folder / "model.safetensors", metadata={"format": "pt"})
        return
    weight_map = {}
    for i, shard in enumerate(shards, 1):
        file = f"model-{i:05d}-of-{len(shards):05d}.safetensors"
        save_file(shard, folder / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(shard, file)
    total = sum(tensor.nbytes for tensor in weights.values())
    _write_json(
        folder / "model.safetensors.index.json",
        {"metadata": {"total_size": total}, "weight_map": weight_map},
    )


@cache
def _tokenizer_json(vocab_size: int) -> str:
    """Train once a process; 256 bytes, the special tokens and as many merges as fit."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.train_from_iterator(
        _CORPUS,
        trainers.BpeTrainer(
            vocab_size=vocab_size,
            special_tokens=[AddedToken(token, special=True, normalized=False) for token in SPECIAL_TOKENS],
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        ),
    )
    return tokenizer.to_str()


def _write_json(path: Path, value: dict[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2))
