"""What the engine's configuration becomes on a device."""

from pathlib import Path

import pytest
import torch

from disagg.config import EngineConfig, ModelConfig
from disagg.engine import build
from disagg.engine.build import load_rank
from disagg.errors import ConfigError
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
