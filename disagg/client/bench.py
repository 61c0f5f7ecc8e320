"""A whole measurement: warm up, load, and show how far it is."""

from msgspec.structs import replace
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from disagg.client.load import Load, Outcome, run_load
from disagg.client.server import ServerError
from disagg.client.workload import Workload, plan_arrivals, plan_prompts

WARMUP_SEED = 1_000_003
"""Warm-ups have prompts of their own: those to be measured must not be in the server's prefix cache."""


async def run_benchmark(
    load: Load,
    workload: Workload,
    *,
    request_rate: float,
    burstiness: float,
    num_warmups: int,
    console: Console,
) -> list[Outcome]:
    """Send a workload and return what came of it; a bar on `console` where that is a terminal.

    Raises:
        ServerError: A warm-up failed, and so would everything after it.
    """
    await _warm_up(load, workload, num_warmups)
    prompts = plan_prompts(workload)
    arrivals = plan_arrivals(len(prompts), request_rate, burstiness, workload.seed)
    note = TextColumn("{task.fields[tokens]} tokens")
    columns = (TextColumn("requests"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), note)
    with Progress(*columns, console=console, disable=not console.is_terminal) as progress:
        bar = progress.add_task("", total=len(prompts), tokens=0)
        tokens = 0

        def on_done(outcome: Outcome) -> None:
            nonlocal tokens
            tokens += outcome.output_tokens
            progress.update(bar, advance=1, tokens=tokens)

        return await run_load(load, prompts, arrivals, on_done)


async def _warm_up(load: Load, workload: Workload, num_warmups: int) -> None:
    prompts = plan_prompts(replace(workload, num_prompts=num_warmups, seed=workload.seed + WARMUP_SEED))
    for outcome in await run_load(load, prompts, [0.0] * len(prompts)):
        if outcome.error is not None:
            raise ServerError(f"a warm-up request failed: {outcome.error}")
