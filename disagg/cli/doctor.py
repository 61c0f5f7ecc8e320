"""`disagg doctor`."""

import click

from disagg.config import ModelConfig, ServeConfig
from disagg.doctor import Finding, can_serve, examine

_MARKS = {"ok": ("ok", "green"), "note": ("note", "yellow"), "missing": ("MISSING", "red")}


@click.command()
@click.argument("model", default=ModelConfig().model)
@click.option(
    "--host", default=ServeConfig().host, show_default=True, help="Interface that serving would bind."
)
@click.option(
    "--port",
    type=click.IntRange(0, 65535),
    default=ServeConfig().port,
    show_default=True,
    help="Port that serving would bind.",
)
def doctor(model: str, host: str, port: int) -> None:
    """Say whether this machine can serve MODEL, and how well.

    Pushes KV pages between two processes to measure the transport. Status 1 if serving
    cannot work.
    """
    findings: list[Finding] = []
    for finding in examine(model, host, port):
        findings.append(finding)
        mark, colour = _MARKS[finding.status]
        click.echo(f"{click.style(f'{mark:<8}', fg=colour)}{finding.subject:<14}{finding.detail}")
        if finding.advice:
            click.echo(f"{'':<22}{finding.advice}")
    if not can_serve(findings):
        click.echo("\nServing cannot work until what is MISSING is mended.")
        raise SystemExit(1)
    click.echo("\nReady to serve: disagg serve")
