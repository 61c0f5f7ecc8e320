"""The namespace of the tests, and what is printed where one fails."""

import shutil
from collections.abc import Iterator
from typing import Any

import pytest

from e2e.cluster import NAMESPACE, CommandFailed, get, kubectl, run


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
        report.sections.append(("cluster", _everything()))
    return report


def _everything() -> str:
    parts = []
    for command in (
        ("get", "all,networkpolicies,endpointslices,persistentvolumeclaims", "-o", "wide"),
        ("get", "events", "--sort-by=.lastTimestamp"),
        ("describe", "pods"),
    ):
        parts.append(_output(*command))
    for pod in get("pods"):
        name = pod["metadata"]["name"]
        parts.append(_output("logs", name, "--tail=200"))
        if any(status["restartCount"] for status in pod["status"].get("containerStatuses", [])):
            parts.append(_output("logs", name, "--previous", "--tail=200"))
    return "\n".join(parts)


def _output(*arguments: str) -> str:
    try:
        return f"--- kubectl {' '.join(arguments)}\n{kubectl(*arguments)}"
    except CommandFailed as error:
        return f"--- {error}"
