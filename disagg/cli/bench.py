"""`disagg bench`: the group; each benchmark is a module of its own."""

import click

from disagg.cli.lazy import LazyGroup

BENCHES = {
    "offline": ("disagg.cli.bench_offline:bench_offline", "Run one engine in this process, without servers."),
    "serve": ("disagg.cli.bench_serve:bench_serve", "Load any OpenAI server, at a rate or at a concurrency."),
}


@click.group(cls=LazyGroup, table=BENCHES)
def bench() -> None:
    """Measure an engine or a server; `--output-json` files have vLLM's field names."""
