"""`disagg drain` stays on its machine."""

import pytest
from click.testing import CliRunner

from disagg.cli.drain import drain


def test_a_proxy_is_not_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    """With HTTP_PROXY in a pod's environment preStop would fail, and the pod stop without a drain."""
    for name in ("http_proxy", "HTTP_PROXY"):
        monkeypatch.setenv(name, "http://proxy.invalid:3128")
    result = CliRunner().invoke(drain, ["http://127.0.0.1:1"])
    assert result.exit_code == 1
    assert "Connection refused" in result.output
