import socket

import pytest
import torch

from disagg.doctor import Finding, can_serve, check_descriptors, check_port, examine


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
