"""`disagg bench offline`."""

import json
from typing import IO, Any

import click
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from disagg.cli.offline import OfflineConfig, load_llm
from disagg.cli.options import build, config_options
from disagg.errors import RequestError


@click.command()
@click.option("--num-prompts", type=click.IntRange(1), default=256, show_default=True, help="Requests.")
@click.option("--min-len", type=click.IntRange(1), default=100, show_default=True, help="Of a prompt.")
@click.option("--max-len", type=click.IntRange(1), default=1024, show_default=True, help="Of a prompt.")
@click.option("--min-output-len", type=click.IntRange(1), help="Of an output; by default --min-len.")
@click.option("--max-output-len", type=click.IntRange(1), help="Of an output; by default --max-len.")
@click.option(
    "--temperature", type=click.FloatRange(0, 2), default=0.0, show_default=True, help="0 is greedy."
)
@click.option(
    "--output-json",
    type=click.File("w", lazy=False),
    help="File for the figures, named as vLLM's; - is stdout.",
)
@config_options(OfflineConfig)
def bench_offline(
    num_prompts: int,
    min_len: int,
    max_len: int,
    min_output_len: int | None,
    max_output_len: int | None,
    temperature: float,
    output_json: IO[str] | None,
    **values: Any,
) -> None:
    """Run random requests through one engine in this process, all at once.

    Lengths of prompts and outputs are uniform between the bounds, drawn by --seed like the tokens;
    end tokens are ignored. The table goes to stderr.
    """
    from disagg.offline_bench import Workload, figures, make_work, measure

    console = Console(stderr=True)
    config = build(OfflineConfig, values)
    workload = Workload(
        num_prompts=num_prompts,
        input_len=_bounds("prompt", min_len, max_len),
        output_len=_bounds("output", min_output_len or min_len, max_output_len or max_len),
        temperature=temperature,
        seed=config.model.seed,
    )
    llm = load_llm(config, console)
    work = make_work(workload, llm.spec.vocab_size)
    num_tokens = sum(sampling.max_tokens for _, sampling in work)
    columns = (
        TextColumn("generating"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("tokens {task.fields[rate]:.0f}/s"),
        TimeElapsedColumn(),
    )
    try:
        with Progress(*columns, console=console, transient=True) as progress:
            bar = progress.add_task("", total=num_tokens, rate=0.0)

            def show(num_done: int, elapsed_s: float) -> None:
                progress.update(bar, completed=num_done, rate=num_done / elapsed_s)

            result = figures(config.model.model, measure(llm, work, show))
    except RequestError as error:
        raise click.UsageError(error.message) from error
    console.print(_table(result))
    if output_json is not None:
        output_json.write(json.dumps(result, indent=2) + "\n")


def _bounds(what: str, low: int, high: int) -> tuple[int, int]:
    if low > high:
        raise click.UsageError(f"the least {what} length, {low}, is more than the greatest, {high}")
    return low, high


def _table(result: dict[str, Any]) -> Table:
    table = Table(box=None, show_header=False, padding=(0, 2, 0, 0))
    for name in ("completed", "duration", "total_input_tokens", "total_output_tokens"):
        table.add_row(name, f"{result[name]:g}" if name == "completed" else f"{result[name]:,.6g}")
    for name in ("request_throughput", "output_throughput", "total_token_throughput"):
        table.add_row(name, f"{result[name]:,.2f} /s")
    for name in ("ttft", "tpot", "itl", "e2el"):
        cells = (f"{kind} {result[f'{kind}_{name}_ms']:,.1f}" for kind in ("mean", "median", "p99"))
        table.add_row(f"{name}_ms", ", ".join(cells))
    return table
