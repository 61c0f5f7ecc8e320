"""`disagg serve`."""

from typing import Any

import click

from disagg.cli.options import build, config_options
from disagg.config import ServeConfig


@click.command()
@config_options(ServeConfig, argument="model")
def serve(**values: Any) -> None:
    """Serve MODEL on this machine: a router, and workers that prefill and decode.

    MODEL is a Hugging Face id, a directory of safetensors, or a .gguf file; by default
    a small chat model that needs no account. Prints `Ready: http://HOST:PORT/v1`.
    """
    from disagg.supervisor.serve import run_serve

    raise SystemExit(run_serve(build(ServeConfig, values)))
