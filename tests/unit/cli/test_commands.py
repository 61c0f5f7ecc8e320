"""What commands say of wrong arguments, before they load a model or reach a server."""

import socket
from pathlib import Path

import click
import pytest
from click.testing import CliRunner, Result

from disagg.cli.bench_offline import bench_offline
from disagg.cli.bench_serve import bench_serve
from disagg.cli.chat import chat
from disagg.cli.doctor import doctor
from disagg.cli.generate import generate
from disagg.errors import ConfigError


def run(command: click.Command, *arguments: str, stdin: str = "") -> Result:
    return CliRunner().invoke(command, list(arguments), input=stdin)


@pytest.fixture
def nobody() -> str:
    """The address of a server that is not there."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return f"http://127.0.0.1:{probe.getsockname()[1]}"


@pytest.mark.parametrize("command", [bench_offline, bench_serve])
def test_figures_that_nothing_can_keep_are_refused_before_the_run(
    command: click.Command, tmp_path: Path
) -> None:
    """Minutes of measuring are not lost to a misspelt folder."""
    result = run(command, "--output-json", str(tmp_path / "absent" / "figures.json"))
    assert result.exit_code == 2
    assert "'--output-json'" in result.output
    assert "No such file or directory" in result.output


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ("--min-len", "200", "--max-len", "100"),
            "the least prompt length, 200, is more than the greatest, 100",
        ),
        (("--max-output-len", "50"), "the least output length, 100, is more than the greatest, 50"),
    ],
)
def test_crossed_bounds_are_refused(arguments: tuple[str, ...], message: str) -> None:
    result = run(bench_offline, *arguments)
    assert (result.exit_code, message in result.output) == (2, True)


@pytest.mark.parametrize("port", ["-1", "65536"])
def test_doctor_refuses_a_port_that_does_not_exist(port: str) -> None:
    result = run(doctor, "--port", port)
    assert (result.exit_code, "'--port'" in result.output) == (2, True)


@pytest.mark.parametrize(
    ("flag", "value"),
    [("--max-tokens", "0"), ("--temperature", "3"), ("--top-p", "0"), ("--top-k", "-1"), ("--min-p", "2")],
)
def test_generate_refuses_a_draw_by_its_flag(flag: str, value: str) -> None:
    """Before the model is loaded, in the flag's words and not the request's."""
    result = run(generate, "text", flag, value)
    assert (result.exit_code, f"'{flag}'" in result.output) == (2, True)


@pytest.mark.parametrize(("text", "stdin"), [("", ""), ("-", "\n")])
def test_generate_refuses_an_empty_text(text: str, stdin: str) -> None:
    result = run(generate, text, stdin=stdin)
    assert (result.exit_code, "TEXT: is empty" in result.output) == (2, True)


@pytest.mark.parametrize("command", [chat, bench_serve])
def test_a_key_that_no_header_can_carry_is_refused(command: click.Command, nobody: str) -> None:
    error = run(command, nobody, "--api-key", "ключ").exception
    assert isinstance(error, ConfigError)
    assert "api_key must be printable ASCII" in str(error)
