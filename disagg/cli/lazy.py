"""Groups of commands that are imported when they are run, so that `--help` is quick."""

import importlib
from collections.abc import Mapping
from typing import Any

import click

from disagg.cli.options import ENVIRONMENT_PREFIX

Table = Mapping[str, tuple[str, str]]
"""`MODULE:ATTRIBUTE` and a line of help, by the command's name."""


class LazyGroup(click.Group):
    """Finds its subcommands in a table."""

    def __init__(self, *args: Any, table: Table, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._table = table

    def list_commands(self, ctx: click.Context) -> list[str]:
        """List the commands in the order of the table."""
        return list(self._table)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """Import the module that holds the command, and no other."""
        if cmd_name not in self._table:
            return None
        module, _, attribute = self._table[cmd_name][0].partition(":")
        command = getattr(importlib.import_module(module), attribute)
        assert isinstance(command, click.Command)
        _add_variables(command)
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write the list from the table, importing nothing."""
        with formatter.section("Commands"):
            formatter.write_dl([(name, text) for name, (_, text) in self._table.items()])


def _add_variables(command: click.Command) -> None:
    """Let an environment variable set whatever a flag can."""
    for parameter in command.params:
        if parameter.envvar is None and not getattr(parameter, "hidden", False):
            flag = max(parameter.opts, key=len).lstrip("-")
            parameter.envvar = ENVIRONMENT_PREFIX + flag.upper().replace("-", "_")
