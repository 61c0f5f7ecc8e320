import socket

import pytest
import torch

from disagg.doctor import Finding, can_serve, check_descriptors, check_port, examine, judge_gpu_transport
from disagg.errors import TransferError
from disagg.transfer import ProbeResult


def test_a_port_in_use_is_missing_and_says_what_to_do() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        finding = check_port("127.0.0.1", taken.getsockname()[1])
    assert finding.status == "missing"
    assert "--port" in finding.advice


def test_a_check_that_raises_is_a_finding(monkeypatch: pytest.MonkeyPatch) -> None:
    """A driver that does not fit makes torch raise; the report is then needed most."""

    def fail() -> bool:
        raise RuntimeError("driver too old")

    monkeypatch.setattr(torch.cuda, "is_available", fail)
    findings = (finding for finding in examine("no/model", "127.0.0.1", 0) if finding.subject == "gpu")
    assert next(findings).detail == "RuntimeError: driver too old"


def test_a_note_does_not_stop_serving() -> None:
    assert can_serve([Finding("gpu", "note", ""), check_descriptors()])
    assert not can_serve([Finding("model", "missing", "")])


FAST_IPC = ProbeResult("cuda_ipc", "", 10**9, 0.001)


def test_kv_on_a_gpu_at_speed_is_ok() -> None:
    finding = judge_gpu_transport(FAST_IPC, ProbeResult("nixl", "cuda_ipc", 10**9, 0.005))
    assert finding.status == "ok"
    assert finding.detail.startswith("cuda_ipc: 1000.0 GB/s; nixl (UCX cuda_ipc): 200.0 GB/s between")


def test_ucx_that_falls_back_is_noted_with_the_cause(monkeypatch: pytest.MonkeyPatch) -> None:
    """It says nothing itself, and serving works, a hundred times slower between pods."""
    monkeypatch.setenv("UCX_TLS", "tcp,self")
    finding = judge_gpu_transport(FAST_IPC, ProbeResult("nixl", "tcp", 10**9, 2.0))
    assert finding.status == "note"
    assert finding.advice == "UCX has fallen back to a slow way: UCX_TLS=tcp,self leaves out cuda_ipc."


def test_a_way_that_fails_is_noted_in_its_words() -> None:
    finding = judge_gpu_transport(
        TransferError("CUDA exports no pool"), ProbeResult("nixl", "tcp", 10**9, 0.01)
    )
    assert (finding.status, finding.advice) == ("note", "No KV by cuda_ipc: CUDA exports no pool.")
