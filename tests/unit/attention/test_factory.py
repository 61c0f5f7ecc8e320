import sys

import pytest
import torch

from disagg.attention import AttentionBackend, AttentionSizes, make_attention
from disagg.errors import ConfigError
from disagg.kv.layout import PageLayout


def make(spec: str, device: str = "cpu", dtype: torch.dtype = torch.float32) -> AttentionBackend:
    layout = PageLayout(16, 1, 1, 64, dtype.itemsize)
    return make_attention(spec, AttentionSizes(layout=layout, num_qo_heads=3, dtype=dtype), device, 1)


@pytest.mark.parametrize(
    ("spec", "name"),
    [
        ("auto", "cpu"),
        ("cpu", "cpu"),
        ("reference", "reference"),
        ("cpu,cpu", "cpu"),
        ("reference,cpu", "reference,cpu"),
        ("cpu, reference", "cpu,reference"),
    ],
)
def test_a_name_or_a_pair_makes_its_backends(spec: str, name: str) -> None:
    assert make(spec).name == name


@pytest.mark.parametrize("spec", ["", "gpu", "cpu,", "cpu,cpu,cpu"])
def test_an_unknown_name_is_refused_with_those_that_exist(spec: str) -> None:
    with pytest.raises(ConfigError, match="auto, cpu, cuda, reference, fi, fa"):
        make(spec)


@pytest.mark.parametrize(("spec", "extra"), [("fi", "cuda"), ("fa", "flash-attn"), ("fi,cpu", "cuda")])
def test_gpu_backends_are_refused_by_name(spec: str, extra: str) -> None:
    """Asked for and missing is an error, never another path."""
    with pytest.raises(ConfigError, match=rf"disagg\[{extra}\]"):
        make(spec)


def test_cpu_kernels_are_refused_elsewhere_and_for_other_types() -> None:
    with pytest.raises(ConfigError, match="device cuda"):
        make("cpu", device="cuda")
    with pytest.raises(ConfigError, match="float16"):
        make("cpu", dtype=torch.float16)


def test_without_kernels_for_a_gpu_auto_is_what_runs_anywhere(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("disagg.attention.factory.find_spec", lambda name: None)
    assert make("auto", device="cuda").name == "reference"


@pytest.mark.parametrize("spec", ["cuda", "cuda,fi"])
def test_the_decode_kernel_is_refused_for_prefill(spec: str) -> None:
    with pytest.raises(ConfigError, match="for decode alone; use fi,cuda"):
        make(spec, device="cuda", dtype=torch.bfloat16)


def test_flashinfer_is_refused_for_what_its_kernels_do_not_take(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "flashinfer", object())
    with pytest.raises(ConfigError, match="bfloat16 or float16, got float32; use reference"):
        make("fi", device="cuda")
