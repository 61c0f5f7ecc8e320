"""The command group."""

import click

from disagg.cli.lazy import LazyGroup
from disagg.errors import ConfigError

COMMANDS = {
    "serve": ("disagg.cli.serve:serve", "Serve a model: router, prefill and decode workers on this machine."),
    "router": ("disagg.cli.router:router", "Run one router."),
    "worker": ("disagg.cli.worker:worker", "Run one worker of either role."),
    "drain": ("disagg.cli.drain:drain", "Have a process on this machine take nothing new."),
    "chat": ("disagg.cli.chat:chat", "Talk to a running server in the terminal."),
    "generate": ("disagg.cli.generate:generate", "Run the engine in this process on one prompt."),
    "bench": ("disagg.cli.bench:bench", "Measure an engine or a server."),
    "doctor": ("disagg.cli.doctor:doctor", "Say whether this machine can serve, and how well."),
}


@click.group(
    cls=LazyGroup,
    table=COMMANDS,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 80},
)
@click.version_option(package_name="disagg")
def group() -> None:
    """Serve large language models with prefill and decode in separate pools."""


def main() -> None:
    """Run the command line; a wrong configuration ends in one sentence and status 2."""
    try:
        group(prog_name="disagg")
    except ConfigError as error:
        click.echo(f"disagg: {error}", err=True)
        raise SystemExit(2) from error
