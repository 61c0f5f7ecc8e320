"""Tests that need a CUDA device. At their end they tell the largest error that each operator had."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from support.gpu import ERRORS

HERE = Path(__file__).parent


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if HERE in item.path.parents:
            item.add_marker(pytest.mark.gpu)
            if not torch.cuda.is_available():
                item.add_marker(pytest.mark.skip(reason="torch finds no GPU"))


@pytest.fixture(autouse=True)
def _no_error_is_left() -> Iterator[None]:
    """An illegal access is told by the test that made it."""
    yield
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    if ERRORS:
        terminalreporter.section(f"largest errors against float64 on {torch.cuda.get_device_name()}")
    for name, error in sorted(ERRORS.items()):
        terminalreporter.write_line(f"{name:40} {error:.2e}")
