"""The namespace of the tests, and what is printed where one fails."""

import shutil
from collections.abc import Iterator
from typing import Any

import pytest

from e2e.cluster import NAMESPACE, CommandFailed, everything, run


@pytest.fixture(scope="session", autouse=True)
def namespace() -> Iterator[None]:
    """A namespace of our own; removed with all that is in it."""
    if shutil.which("kubectl") is None or shutil.which("helm") is None:
        pytest.skip("no kubectl and helm on PATH")
    try:
        run("kubectl", "version", timeout_s=30)
    except CommandFailed as error:
        pytest.skip(f"no cluster: {error}")
    run("kubectl", "create", "namespace", NAMESPACE)
    yield
    run("kubectl", "delete", "namespace", NAMESPACE, "--timeout=300s", timeout_s=320)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Iterator[Any]:
    """Add logs, events and objects of all pods to a failed test, while they are there."""
    report = yield
    if report.failed:
        report.sections.append(("cluster", everything()))
    return report
