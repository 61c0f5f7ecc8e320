"""Where the CUDA kernels run."""

import pytest
import torch

from disagg.layers import kernels


def why(monkeypatch: pytest.MonkeyPatch, *, is_built: bool, capability: tuple[int, int] | None) -> str | None:
    monkeypatch.setattr(kernels, "find_spec", lambda name: object() if is_built else None)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: capability is not None)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: capability)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "NVIDIA A100")
    return kernels.why_no_cuda_kernels.__wrapped__()


def test_they_run_on_hopper(monkeypatch: pytest.MonkeyPatch) -> None:
    assert why(monkeypatch, is_built=True, capability=(9, 0)) is None


@pytest.mark.parametrize(
    ("is_built", "capability", "reason"),
    [
        (False, (9, 0), "no nvcc was found"),
        (True, None, "finds no GPU"),
        (True, (8, 0), "compute capability 9.0; NVIDIA A100 has 8.0"),
    ],
)
def test_elsewhere_it_says_why_not(
    monkeypatch: pytest.MonkeyPatch, is_built: bool, capability: tuple[int, int] | None, reason: str
) -> None:
    said = why(monkeypatch, is_built=is_built, capability=capability)
    assert said is not None
    assert reason in said
