"""Which kernels of FlashInfer's are asked for, without the library: a small fake stands for it."""

import logging
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch

from disagg.attention import AttentionSizes, flashinfer_kernels
from disagg.attention.flashinfer import _load
from disagg.errors import ConfigError
from disagg.kv.layout import PageLayout

SIZES = AttentionSizes(layout=PageLayout(16, 8, 2, 128, 2), num_qo_heads=32, dtype=torch.bfloat16)
BF16 = torch.bfloat16
PLANNED = (BF16, BF16, BF16, torch.int32, 128, 128, 0, False, False, False)
"""As `plan` of FlashInfer's wrappers derives them from what our backends hand it: the types of queries, KV,
output and page tables, the two head sizes, no rotation, no window, no soft cap, no float16 reduction."""


class FakeLibrary:
    """FlashInfer's loader: what is asked of it, and the folders of what it finds and what it compiles."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.loaded: list[tuple[Any, ...]] = []
        self.built: list[str] = []
        self.fails: Exception | None = None

    def gen_batch_prefill_module(self, backend: str, *arguments: Any) -> SimpleNamespace:
        name = f"{backend}_{str(arguments[0]).removeprefix('torch.')}_{arguments[4]}"
        ahead, compiled = (self.folder / kind / name / f"{name}.so" for kind in ("aot", "jit"))
        return SimpleNamespace(
            name=name,
            aot_path=ahead,
            is_aot=ahead.exists(),
            jit_library_path=compiled,
            is_compiled=ahead.exists() or compiled.exists(),
        )

    def get_batch_prefill_module(self, *kernel: Any) -> None:
        if self.fails:
            raise self.fails
        self.loaded.append(kernel)

    def build_jit_specs(self, specs: list[SimpleNamespace]) -> None:
        for spec in specs:
            spec.jit_library_path.parent.mkdir(parents=True)
            spec.jit_library_path.write_text(spec.name)
            self.built.append(spec.name)


@pytest.fixture
def library(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> FakeLibrary:
    fake = FakeLibrary(tmp_path)
    for name, function in {
        "flashinfer.jit": fake.build_jit_specs,
        "flashinfer.jit.attention": fake.gen_batch_prefill_module,
        "flashinfer.prefill": fake.get_batch_prefill_module,
    }.items():
        module = ModuleType(name)
        setattr(module, function.__name__, function)
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.setitem(sys.modules, "flashinfer", ModuleType("flashinfer"))
    for name in ("CUDA_HOME", "FLASHINFER_CUDA_ARCH_LIST", "LIBRARY_PATH"):
        monkeypatch.setenv(name, "")
    return fake


def test_a_kernel_is_loaded_under_the_name_that_the_plan_asks_for(library: FakeLibrary) -> None:
    """Under any other it would be compiled a second time, in the middle of the first request."""
    _load("fa3", SIZES)
    assert library.loaded == [("fa3", *PLANNED)]


def test_what_is_compiled_at_start_is_said(library: FakeLibrary, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    _load("fa2", SIZES)
    begun, ended = caplog.messages
    assert begun.endswith("kernel=fa2_bfloat16_128")
    assert ended.startswith("compiled kernel=fa2_bfloat16_128 seconds=")


def test_what_was_compiled_ahead_is_loaded_in_silence(
    library: FakeLibrary, caplog: pytest.LogCaptureFixture
) -> None:
    flashinfer_kernels.compile_ahead([128], [BF16])
    _load("fa3", SIZES)
    assert caplog.messages == []
    assert len(library.loaded) == 1


@pytest.mark.parametrize(
    "failure", [RuntimeError("Could not find nvcc\nhere or there"), FileNotFoundError("ninja")]
)
def test_a_kernel_that_cannot_be_compiled_is_refused_at_start(
    library: FakeLibrary, failure: Exception
) -> None:
    """Without a compiler, as in the image; one sentence, whatever FlashInfer says after its first line."""
    library.fails = failure
    with pytest.raises(ConfigError) as refused:
        _load("fa3", SIZES)
    assert "heads of 128 and dtype bfloat16" in str(refused.value)
    assert str(failure).partition("\n")[0] in str(refused.value)
    assert "\n" not in str(refused.value)


def test_the_kernels_of_both_phases_are_compiled_where_flashinfer_looks_first(
    library: FakeLibrary, tmp_path: Path
) -> None:
    made = flashinfer_kernels.compile_ahead([64, 128], [BF16, torch.float16])
    names = {f"{b}_{d}_{n}" for b in ("fa2", "fa3") for d in ("bfloat16", "float16") for n in (64, 128)}
    assert {path.relative_to(tmp_path / "aot") for path in made} == {Path(n, f"{n}.so") for n in names}
    assert all(path.read_text() == path.stem for path in made)


def test_what_is_compiled_already_is_left(library: FakeLibrary) -> None:
    flashinfer_kernels.compile_ahead([64], [BF16])
    flashinfer_kernels.compile_ahead([64, 256], [BF16])
    assert sorted(library.built) == sorted(set(library.built))
    assert len(library.built) == 4


def test_the_command_compiles_for_hopper_unless_told_otherwise(
    library: FakeLibrary, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delenv("FLASHINFER_CUDA_ARCH_LIST")
    monkeypatch.setattr(sys, "argv", ["", "--head-dims", "64", "--dtypes", "float16", "--phases", "prefill"])
    flashinfer_kernels.main()
    assert library.built == ["fa3_float16_64"]
    assert flashinfer_kernels.os.environ["FLASHINFER_CUDA_ARCH_LIST"] == "9.0a"
    assert capsys.readouterr().out.count(".so\n") == 1
