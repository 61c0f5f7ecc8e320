import sys

import pytest
import torch
from msgspec.structs import replace

from disagg.attention import AttentionBackend, AttentionSizes, factory, flashinfer, make_attention
from disagg.attention.cuda import is_fast
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
    with pytest.raises(ConfigError, match="auto, cpu, cuda, reference, fi, or two"):
        make(spec)


@pytest.mark.parametrize("spec", ["fi", "fi,cpu"])
def test_gpu_backends_are_refused_by_name(spec: str) -> None:
    """Asked for and missing is an error, never another path."""
    with pytest.raises(ConfigError, match=r"disagg\[cuda\]"):
        make(spec)


@pytest.mark.parametrize("spec", ["fa", "fa,fi", "cpu,fa"])
def test_flash_attn_is_refused_for_either_phase(spec: str) -> None:
    with pytest.raises(ConfigError, match=r"attention_backend fa is not in this version: .* use fi or auto"):
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


@pytest.mark.parametrize(
    ("heads", "changes", "fast"),
    [
        (4, {}, True),
        (8, {}, True),
        (9, {}, False),  # query heads a KV head
        (4, {"head_dim": 96}, False),
        (4, {"page_size": 24}, False),
    ],
)
def test_the_fast_decode_kernel_knows_its_sizes(heads: int, changes: dict[str, int], fast: bool) -> None:
    pytest.importorskip("disagg._cuda")
    shape = {"page_size": 16, "num_heads": 1, "num_layers": 1, "head_dim": 128, "item_bytes": 2, **changes}
    sizes = AttentionSizes(layout=PageLayout(**shape), num_qo_heads=heads, dtype=torch.bfloat16, max_rows=8)
    assert is_fast(sizes) is fast
    assert not is_fast(replace(sizes, dtype=torch.float32))
    assert is_fast(replace(sizes, kv_dtype=torch.float8_e4m3fn)) is fast
    assert not is_fast(replace(sizes, max_rows=1 << 20)), "more rows than it takes"


def test_a_pool_of_another_type_is_decoded_by_the_kernel_that_takes_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(factory, "why_no_cuda_kernels", lambda: None)
    monkeypatch.setattr(factory, "find_spec", lambda name: object())
    monkeypatch.setattr(factory, "is_fast", lambda sizes: False)
    layout, narrow = PageLayout(16, 1, 1, 64, 1), torch.float8_e4m3fn
    sizes = AttentionSizes(layout=layout, num_qo_heads=4, dtype=torch.bfloat16, kv_dtype=narrow)
    assert factory._pick("auto", "decode", torch.device("cuda"), sizes) == "cuda"
    assert factory._pick("auto", "prefill", torch.device("cuda"), sizes) == "fi"
    with pytest.raises(ConfigError, match="kv_cache_dtype is fp8; use fi,cuda"):
        flashinfer.FlashInferDecode(sizes, torch.device("cuda"))


def test_pages_of_a_narrow_pool_are_widened_in_the_order_asked_for() -> None:
    values = torch.randn(5, 2, 3, 2, 16, 8).to(torch.float8_e4m3fn)
    wide = flashinfer.widened_pages(values, 1, torch.tensor([3, 0, 3]), torch.bfloat16)
    assert wide.dtype == torch.bfloat16
    assert torch.equal(wide[:, :, 0].float(), values.float()[[3, 0, 3], :, 1])


@pytest.mark.parametrize("fast", [True, False])
def test_auto_decodes_by_the_kernel_that_is_fast(monkeypatch: pytest.MonkeyPatch, fast: bool) -> None:
    """The plain kernel takes anything, and FlashInfer's is faster wherever it takes the model."""
    monkeypatch.setattr(factory, "why_no_cuda_kernels", lambda: None)
    monkeypatch.setattr(factory, "find_spec", lambda name: object())
    monkeypatch.setattr(factory, "is_fast", lambda sizes: fast)
    layout = PageLayout(16, 1, 1, 128, 2)
    sizes = AttentionSizes(layout=layout, num_qo_heads=4, dtype=torch.bfloat16)
    assert factory._pick("auto", "decode", torch.device("cuda"), sizes) == ("cuda" if fast else "fi")
    assert factory._pick("auto", "prefill", torch.device("cuda"), sizes) == "fi"
    odd = replace(sizes, layout=replace(layout, head_dim=96))
    assert factory._pick("auto", "decode", torch.device("cuda"), odd) == "cuda"
