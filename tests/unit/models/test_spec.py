"""config.json of each family becomes one record; what is not supported is refused by name."""

import json
from pathlib import Path
from typing import Any

import pytest

from disagg.errors import ConfigError
from disagg.layers.rope import RopeSpec
from disagg.models import load_spec
from disagg.models.spec import ExpertsSpec
from support.checkpoints import END, END_OF_TEXT, make_checkpoint


def edit(folder: Path, name: str = "config.json", **fields: Any) -> Path:
    path = folder / name
    kept = {k: v for k, v in {**json.loads(path.read_text()), **fields}.items() if v is not ...}
    path.write_text(json.dumps(kept))
    return folder


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return make_checkpoint(tmp_path / "m", num_hidden_layers=1)


@pytest.mark.parametrize(
    ("family", "biases", "qk_norm"),
    [
        ("llama", (False, False, False), False),
        ("llama_linear", (True, True, True), False),
        ("mistral", (False, False, False), False),
        ("qwen2", (True, False, False), False),
        ("qwen3", (False, False, False), True),
        ("qwen3_moe", (False, False, False), True),
    ],
)
def test_families_differ_by_a_row(
    tmp_path: Path, family: str, biases: tuple[bool, bool, bool], qk_norm: bool
) -> None:
    spec = load_spec(make_checkpoint(tmp_path / "m", family, num_hidden_layers=1))
    assert (spec.qkv_bias, spec.output_bias, spec.mlp_bias) == biases
    assert spec.qk_norm == qk_norm
    assert (spec.num_heads, spec.num_kv_heads, spec.num_layers) == (12, 6, 1)
    assert spec.head_dim == (32 if family.startswith("qwen3") else 16)
    assert (spec.experts is not None) == (family == "qwen3_moe")


def test_experts_have_their_own_width(tmp_path: Path) -> None:
    spec = load_spec(make_checkpoint(tmp_path / "m", "qwen3_moe", num_hidden_layers=1))
    assert spec.experts == ExpertsSpec(count=12, choices=3, normalize=True)
    assert (spec.intermediate_size, spec.mlp_width) == (96, 288)
    assert load_spec(make_checkpoint(tmp_path / "d")).mlp_width == 384


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"decoder_sparse_step": 2}, "decoder_sparse_step 2 with mlp_only_layers [] is not supported"),
        ({"mlp_only_layers": [1]}, "decoder_sparse_step 1 with mlp_only_layers [1] is not supported"),
        ({"num_experts_per_tok": 13}, "num_experts_per_tok 13 is not between 1 and num_experts 12"),
        ({"num_experts": ...}, "`num_experts`"),
    ],
)
def test_experts_that_are_not_supported_are_refused(
    tmp_path: Path, fields: dict[str, Any], words: str
) -> None:
    folder = edit(make_checkpoint(tmp_path / "m", "qwen3_moe", num_hidden_layers=1), **fields)
    with pytest.raises(ConfigError) as refused:
        load_spec(folder)
    assert words in str(refused.value)


def test_absent_fields_have_the_families_defaults(folder: Path) -> None:
    edit(folder, num_key_value_heads=..., head_dim=..., rope_theta=..., rms_norm_eps=..., torch_dtype=...)
    spec = load_spec(folder)
    assert spec.num_kv_heads == spec.num_heads
    assert spec.head_dim == spec.hidden_size // spec.num_heads
    assert spec.rope == RopeSpec(theta=10000.0)
    assert spec.rms_eps == 1e-6
    assert spec.dtype == "float32"


LLAMA3 = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}


@pytest.mark.parametrize(
    ("fields", "rope"),
    [
        ({"rope_theta": 5e5}, RopeSpec(theta=5e5)),
        ({"rope_scaling": {"type": "linear", "factor": 2}}, RopeSpec(kind="linear", factor=2.0)),
        (
            {
                "rope_theta": ...,
                "rope_parameters": {
                    "rope_theta": 7.0,
                    "rope_type": "llama3",
                    "original_max_position_embeddings": 64,
                    **LLAMA3,
                },
            },
            RopeSpec(theta=7.0, kind="llama3", factor=8.0, original_max_position=64),
        ),
        ({"rope_parameters": {"rope_theta": 3.0, "rope_type": "default"}}, RopeSpec(theta=3.0)),
    ],
)
def test_rope_is_read_in_its_old_and_new_form(folder: Path, fields: dict[str, Any], rope: RopeSpec) -> None:
    assert load_spec(edit(folder, **fields)).rope == rope


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"model_type": "gpt2"}, "model_type 'gpt2' is not one of llama, mistral"),
        ({"hidden_size": "large"}, "hidden_size"),
        ({"vocab_size": ...}, "vocab_size"),
        ({"hidden_act": "gelu"}, "hidden_act 'gelu' is not supported"),
        ({"num_key_value_heads": 5}, "num_attention_heads 12 is not a multiple of num_key_value_heads 5"),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 2}}, "rope_type 'yarn' is not one of"),
        ({"rope_scaling": {"rope_type": "llama3", "factor": 2}}, "of type 'llama3' lacks 'low_freq_factor'"),
        ({"rope_parameters": {"partial_rotary_factor": 0.5}}, "partial_rotary_factor 0.5"),
        ({"quantization_config": {"quant_method": "awq"}}, "quant_method 'awq' is not supported"),
        ({"model_type": "mistral", "sliding_window": 128}, "sliding_window 128 is not supported"),
        (
            {"model_type": "qwen2", "sliding_window": 128, "use_sliding_window": True},
            "sliding_window 128 is not supported",
        ),
    ],
)
def test_what_is_not_supported_is_refused_by_name(folder: Path, fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load_spec(edit(folder, **fields))


@pytest.mark.parametrize(
    "fields",
    [
        {"model_type": "qwen2", "sliding_window": 128, "use_sliding_window": False},
        {"model_type": "mistral", "sliding_window": 512},  # as long as the context: no window
    ],
)
def test_a_window_that_never_applies_is_no_obstacle(folder: Path, fields: dict[str, Any]) -> None:
    load_spec(edit(folder, **fields))


@pytest.mark.parametrize(
    ("declared", "expected"),
    [([END, END_OF_TEXT], (END, END_OF_TEXT)), (END, (END,)), (..., (END,))],
)
def test_end_tokens_come_from_the_generation_config_first(
    folder: Path, declared: Any, expected: tuple[int, ...]
) -> None:
    edit(folder, "generation_config.json", eos_token_id=declared)
    assert load_spec(folder).eos_token_ids == expected


def test_a_quantization_of_null_is_none(folder: Path) -> None:
    load_spec(edit(folder, quantization_config=None))


def test_a_model_may_have_no_end_token(folder: Path) -> None:
    (folder / "generation_config.json").unlink()
    assert load_spec(edit(folder, eos_token_id=None)).eos_token_ids == ()


@pytest.mark.parametrize("content", [None, b"", b"{", b"[]"])
def test_a_config_that_cannot_be_read_is_named(folder: Path, content: bytes | None) -> None:
    (folder / "config.json").unlink()
    if content is not None:
        (folder / "config.json").write_bytes(content)
    with pytest.raises(ConfigError, match=r"config.json cannot be read"):
        load_spec(folder)
