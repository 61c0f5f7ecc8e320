"""What a model is, read from config.json: one record, whatever the family calls things.

Families are rows of `FAMILIES`; a new one that is a pre-norm decoder with rotary attention and a
gated MLP is one more row.
"""

from pathlib import Path
from typing import Any

from msgspec import DecodeError, Struct, ValidationError, convert
from msgspec.json import decode

from disagg.errors import ConfigError
from disagg.layers.rope import RopeSpec

DTYPES = ("float32", "bfloat16", "float16")


class Family(Struct, frozen=True):
    """One family's differences. A string names the field of config.json that decides."""

    qkv_bias: bool | str = False
    output_bias: bool | str = False
    mlp_bias: bool | str = False
    qk_norm: bool = False
    """RMSNorm over each head of q and k, before rope."""
    experts: bool = False
    """Each token goes through a few of a layer's many MLPs."""
    sliding_window_if: str = ""
    """Field of config.json without which `sliding_window` has no effect."""


FAMILIES = {
    "llama": Family(qkv_bias="attention_bias", output_bias="attention_bias", mlp_bias="mlp_bias"),
    "mistral": Family(),
    "qwen2": Family(qkv_bias=True, sliding_window_if="use_sliding_window"),
    "qwen3": Family(
        qkv_bias="attention_bias",
        output_bias="attention_bias",
        qk_norm=True,
        sliding_window_if="use_sliding_window",
    ),
    "qwen3_moe": Family(
        qkv_bias="attention_bias",
        output_bias="attention_bias",
        qk_norm=True,
        experts=True,
        sliding_window_if="use_sliding_window",
    ),
}


class ExpertsSpec(Struct, frozen=True, kw_only=True):
    """The mixture of experts that stands in each layer for its MLP."""

    count: int
    choices: int
    """Experts that a token goes through."""
    normalize: bool
    """Whether their weights sum to one; otherwise they are shares of all experts'."""


class ModelSpec(Struct, frozen=True, kw_only=True):
    """Shapes and constants of one model."""

    family: str
    num_layers: int
    hidden_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    intermediate_size: int
    """Of one expert where there are experts."""
    vocab_size: int
    rope: RopeSpec
    rms_eps: float
    tie_word_embeddings: bool
    qk_norm: bool
    qkv_bias: bool
    output_bias: bool
    mlp_bias: bool
    max_position_embeddings: int
    eos_token_ids: tuple[int, ...]
    dtype: str
    """In which the checkpoint is stored: what `--dtype auto` means."""
    initializer_range: float = 0.02
    experts: ExpertsSpec | None = None

    @property
    def mlp_width(self) -> int:
        """Inner elements of all that one token goes through."""
        return self.intermediate_size * (self.experts.choices if self.experts else 1)


class _Config(Struct, frozen=True, kw_only=True):
    """The fields of config.json that every family has."""

    model_type: str
    num_hidden_layers: int
    hidden_size: int
    num_attention_heads: int
    num_key_value_heads: int | None = None
    head_dim: int | None = None
    intermediate_size: int
    vocab_size: int
    rms_norm_eps: float = 1e-6
    rope_theta: float = 10000.0
    rope_scaling: dict[str, Any] | None = None
    rope_parameters: dict[str, Any] | None = None
    tie_word_embeddings: bool = False
    max_position_embeddings: int
    hidden_act: str = "silu"
    sliding_window: int | None = None
    eos_token_id: int | list[int] | None = None
    dtype: str | None = None
    torch_dtype: str | None = None
    initializer_range: float = 0.02
    quantization_config: dict[str, Any] | None = None


class _ExpertsConfig(Struct, frozen=True, kw_only=True):
    """The fields of config.json that describe a mixture of experts."""

    num_experts: int
    num_experts_per_tok: int
    moe_intermediate_size: int
    norm_topk_prob: bool = False
    decoder_sparse_step: int = 1
    mlp_only_layers: list[int] = []


def load_spec(folder: Path) -> ModelSpec:
    """Read the config.json, and the end tokens of generation_config.json, of a checkpoint.

    Raises:
        ConfigError: a file is missing or damaged, or the model needs what is not supported; names
            the file, the field and its value.
    """
    path = folder / "config.json"
    raw = _read_json(path)
    try:
        config = convert(raw, _Config)
        family = FAMILIES.get(config.model_type)
        experts = convert(raw, _ExpertsConfig) if family is not None and family.experts else None
    except ValidationError as e:
        raise ConfigError(f"{path}: {e}") from e
    if family is None:
        raise ConfigError(f"{path}: model_type {config.model_type!r} is not one of {', '.join(FAMILIES)}")
    _check_supported(path, raw, config, family)
    if experts is not None:
        _check_experts(path, experts)
    dtype = config.dtype or config.torch_dtype or "float32"
    return ModelSpec(
        family=config.model_type,
        num_layers=config.num_hidden_layers,
        hidden_size=config.hidden_size,
        num_heads=config.num_attention_heads,
        num_kv_heads=config.num_key_value_heads or config.num_attention_heads,
        head_dim=config.head_dim or config.hidden_size // config.num_attention_heads,
        intermediate_size=experts.moe_intermediate_size if experts else config.intermediate_size,
        vocab_size=config.vocab_size,
        rope=_rope(path, config),
        rms_eps=config.rms_norm_eps,
        tie_word_embeddings=config.tie_word_embeddings,
        qk_norm=family.qk_norm,
        qkv_bias=_decided(family.qkv_bias, raw),
        output_bias=_decided(family.output_bias, raw),
        mlp_bias=_decided(family.mlp_bias, raw),
        max_position_embeddings=config.max_position_embeddings,
        eos_token_ids=_eos_token_ids(folder, config),
        dtype=dtype if dtype in DTYPES else "float32",
        initializer_range=config.initializer_range,
        experts=None
        if experts is None
        else ExpertsSpec(
            count=experts.num_experts,
            choices=experts.num_experts_per_tok,
            normalize=experts.norm_topk_prob,
        ),
    )


def _check_supported(path: Path, raw: dict[str, Any], config: _Config, family: Family) -> None:
    if config.hidden_act != "silu":
        raise ConfigError(f"{path}: hidden_act {config.hidden_act!r} is not supported, only 'silu' is")
    if config.num_attention_heads % (config.num_key_value_heads or config.num_attention_heads):
        raise ConfigError(
            f"{path}: num_attention_heads {config.num_attention_heads} is not a multiple of "
            f"num_key_value_heads {config.num_key_value_heads}"
        )
    window = config.sliding_window
    windowed = not family.sliding_window_if or raw.get(family.sliding_window_if, False)
    if window is not None and windowed and window < config.max_position_embeddings:
        raise ConfigError(f"{path}: sliding_window {window} is not supported")
    if config.quantization_config is not None:
        method = config.quantization_config.get("quant_method", "unknown")
        raise ConfigError(f"{path}: quantization_config with quant_method {method!r} is not supported")


def _check_experts(path: Path, experts: _ExpertsConfig) -> None:
    if experts.decoder_sparse_step != 1 or experts.mlp_only_layers:
        raise ConfigError(
            f"{path}: decoder_sparse_step {experts.decoder_sparse_step} with mlp_only_layers "
            f"{experts.mlp_only_layers} is not supported, only experts in every layer are"
        )
    if not 1 <= experts.num_experts_per_tok <= experts.num_experts:
        raise ConfigError(
            f"{path}: num_experts_per_tok {experts.num_experts_per_tok} is not between 1 and "
            f"num_experts {experts.num_experts}"
        )


def _rope(path: Path, config: _Config) -> RopeSpec:
    """Rope's parameters, in the old form (`rope_theta`, `rope_scaling`) or the new (`rope_parameters`)."""
    scaling = config.rope_parameters or config.rope_scaling or {}
    theta = float(scaling.get("rope_theta", config.rope_theta))
    kind = scaling.get("rope_type", scaling.get("type", "default"))
    if scaling.get("partial_rotary_factor", 1.0) != 1.0:
        raise ConfigError(
            f"{path}: partial_rotary_factor {scaling['partial_rotary_factor']} is not supported"
        )
    try:
        match kind:
            case "default":
                return RopeSpec(theta=theta)
            case "linear":
                return RopeSpec(theta=theta, kind="linear", factor=float(scaling["factor"]))
            case "llama3":
                return RopeSpec(
                    theta=theta,
                    kind="llama3",
                    factor=float(scaling["factor"]),
                    low_freq_factor=float(scaling["low_freq_factor"]),
                    high_freq_factor=float(scaling["high_freq_factor"]),
                    original_max_position=int(scaling["original_max_position_embeddings"]),
                )
    except KeyError as e:
        raise ConfigError(f"{path}: rope_scaling of type {kind!r} lacks {e}") from e
    raise ConfigError(f"{path}: rope_type {kind!r} is not one of default, linear, llama3")


def _eos_token_ids(folder: Path, config: _Config) -> tuple[int, ...]:
    """generation_config.json lists all end tokens where config.json has the main one."""
    path = folder / "generation_config.json"
    declared: Any = None
    if path.exists():
        declared = _read_json(path).get("eos_token_id")
    if declared is None:
        declared = config.eos_token_id
    if declared is None:
        return ()
    return tuple(declared) if isinstance(declared, list) else (int(declared),)


def _decided(by: bool | str, raw: dict[str, Any]) -> bool:
    return bool(raw.get(by, False)) if isinstance(by, str) else by


def _read_json(path: Path) -> dict[str, Any]:
    try:
        return convert(decode(path.read_bytes()), dict[str, Any])
    except (OSError, DecodeError, ValidationError) as e:
        raise ConfigError(f"{path} cannot be read: {e}") from e
