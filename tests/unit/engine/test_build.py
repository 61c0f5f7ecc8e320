"""From configuration to an engine: what cannot run is refused in a sentence that names the flag."""

from pathlib import Path

import pytest
import torch
from msgspec.structs import replace

from disagg.config import EngineConfig, ModelConfig
from disagg.engine import build
from disagg.engine.build import load_rank
from disagg.errors import ConfigError
from disagg.models import ModelSpec, load_spec
from support.checkpoints import make_checkpoint

FP8 = EngineConfig(kv_cache_dtype="fp8")


def test_kv_in_fp8_is_refused_on_a_cpu(tmp_path: Path) -> None:
    folder = make_checkpoint(tmp_path / "tiny", "llama")
    with pytest.raises(
        ConfigError, match="kv_cache_dtype fp8 needs a Hopper GPU, and device is cpu; use auto"
    ):
        load_rank(ModelConfig(model=str(folder), device="cpu"), FP8)


@pytest.mark.parametrize(
    ("reason", "dtype", "message"),
    [
        ("no nvcc was found", "bfloat16", "do not run here: no nvcc was found; use auto"),
        (None, "float32", "is for dtype bfloat16 or float16, got float32; use auto"),
    ],
)
def test_kv_in_fp8_is_refused_without_kernels_for_it(
    monkeypatch: pytest.MonkeyPatch, reason: str | None, dtype: str, message: str
) -> None:
    monkeypatch.setattr(build, "why_no_cuda_kernels", lambda: reason)
    with pytest.raises(ConfigError, match=message):
        build._pick_kv_dtype(FP8, dtype, torch.device("cuda"))


def test_kv_is_of_the_models_type_or_of_a_byte(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(build, "why_no_cuda_kernels", lambda: None)
    assert build._pick_kv_dtype(EngineConfig(), "float16", torch.device("cuda")) == "float16"
    assert build.KV_DTYPES[build._pick_kv_dtype(FP8, "bfloat16", torch.device("cuda"))].itemsize == 1


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return make_checkpoint(tmp_path / "m", num_hidden_layers=1)


def test_quantization_on_a_cpu_is_refused_before_anything_is_loaded(folder: Path) -> None:
    (folder / "model.safetensors").write_bytes(b"nothing that can be loaded")
    config = ModelConfig(model=str(folder), device="cpu", quantization="fp8")
    with pytest.raises(ConfigError) as refused:
        build.load_rank(config, EngineConfig())
    assert str(refused.value) == (
        "quantization fp8 needs a Hopper GPU, and the device is cpu; leave it out, or use --device cuda"
    )


def refusal(spec: ModelSpec, dtype: str = "bfloat16", tp_size: int = 1) -> str:
    with pytest.raises(ConfigError) as refused:
        build._check_quantization("fp8", spec, torch.device("cuda"), dtype, tp_size)
    return str(refused.value)


def test_quantization_that_has_no_kernel_is_refused(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    spec = load_spec(folder)
    monkeypatch.setattr(build, "why_no_cuda_kernels", lambda: "they are away")
    assert refusal(spec) == "quantization fp8 needs the CUDA kernels: they are away"
    monkeypatch.setattr(build, "why_no_cuda_kernels", lambda: None)
    build._check_quantization("fp8", spec, torch.device("cuda"), "bfloat16", 2)
    assert refusal(spec, dtype="float16").endswith("dtype is float16; use --dtype bfloat16")
    assert "needs matrices of multiples of 16 on each rank" in refusal(replace(spec, hidden_size=200))
    assert "needs matrices of multiples of 16 on each rank" in refusal(
        replace(spec, intermediate_size=96), tp_size=4
    )
    experts = load_spec(make_checkpoint(tmp_path / "e", "qwen3_moe", num_hidden_layers=1))
    assert refusal(experts) == (
        "quantization fp8 is not made for a mixture of experts (qwen3_moe); leave it out"
    )
