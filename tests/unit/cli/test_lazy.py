"""The table of commands, and the variables that stand for their flags."""

import subprocess
import sys
from collections.abc import Iterator

import click
import pytest
from click.testing import CliRunner

from disagg.cli.main import group


def commands(command: click.Command, name: str = "disagg") -> Iterator[tuple[str, click.Command]]:
    context = click.Context(command)
    if isinstance(command, click.Group):
        for child in command.list_commands(context):
            found = command.get_command(context, child)
            assert found is not None
            yield from commands(found, f"{name} {child}")
    else:
        yield name, command


@pytest.mark.parametrize(
    ("name", "command"), list(commands(group)), ids=lambda value: value if isinstance(value, str) else ""
)
def test_whatever_a_flag_can_set_a_variable_can(name: str, command: click.Command) -> None:
    """Containers are configured by their environment."""
    for option in command.params:
        if getattr(option, "hidden", False):
            continue  # by which a supervisor follows its child
        flags = [flag.lstrip("-") for flag in option.opts]
        variables = [option.envvar] if isinstance(option.envvar, str) else option.envvar or []
        assert {f"DISAGG_{flag.upper().replace('-', '_')}" for flag in flags} <= set(variables), name


def test_a_variable_reaches_a_command_without_a_configuration_of_its_own() -> None:
    result = CliRunner().invoke(group, ["doctor"], env={"DISAGG_PORT": "http"})
    assert result.exit_code == 2
    assert "http" in result.output


def test_an_unknown_command_is_refused() -> None:
    assert CliRunner().invoke(group, ["bench", "nothing"]).exit_code == 2


def test_help_imports_no_command() -> None:
    code = (
        "import sys; from disagg.cli.main import group; group(['--help'], standalone_mode=False);"
        "sys.exit('torch' in sys.modules or 'disagg.cli.serve' in sys.modules)"
    )
    assert (
        subprocess.run([sys.executable, "-c", code], check=False, stdout=subprocess.DEVNULL).returncode == 0
    )
