"""`disagg bench serve`."""

import asyncio
import json
from collections import Counter
from collections.abc import Sequence
from typing import IO, Any

import click


class _Goal(click.ParamType):  # type: ignore[type-arg]  # generic in the newest click only
    """`ttft:2000`."""

    name = "METRIC:MS"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        if isinstance(value, tuple):
            return value
        metric, _, limit = value.partition(":")
        try:
            limit_ms = float(limit)
        except ValueError:
            limit_ms = -1.0
        if metric not in ("ttft", "tpot", "itl", "e2el") or not limit_ms > 0:
            self.fail(f"{value!r} is not ttft, tpot, itl or e2el, a colon and milliseconds", param, ctx)
        return metric, limit_ms


class _Percentiles(click.ParamType):  # type: ignore[type-arg]  # the same
    """`50,99,99.9`."""

    name = "LIST"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        try:
            percentiles = tuple(float(part) for part in str(value).split(","))
        except ValueError:
            percentiles = ()
        if not percentiles or not all(0 < q <= 100 for q in percentiles):
            self.fail(f"{value!r} is not a list of numbers above 0 and up to 100", param, ctx)
        return percentiles


POSITIVE = click.FloatRange(0, min_open=True)
SHARE = click.FloatRange(0, 1)


@click.command()
@click.argument("url", default="http://127.0.0.1:8000", envvar="DISAGG_URL")
@click.option("--model", help="Served model; by default the server's first.")
@click.option("--api-key", envvar=["DISAGG_API_KEY", "OPENAI_API_KEY"], help="Key that the server asks for.")
@click.option(
    "--endpoint", type=click.Choice(["completions", "chat"]), default="completions", show_default=True
)
@click.option("--num-prompts", type=click.IntRange(1), default=100, show_default=True, help="Requests.")
@click.option("--request-rate", type=POSITIVE, default=float("inf"), show_default=True, help="Requests/s.")
@click.option(
    "--burstiness", type=POSITIVE, default=1.0, show_default=True, help="1 is Poisson, less burstier."
)
@click.option("--max-concurrency", type=click.IntRange(1), help="Requests at a time; others wait.")
@click.option(
    "--input-len", type=click.IntRange(1), default=512, show_default=True, help="Words of a prompt."
)
@click.option(
    "--output-len", type=click.IntRange(1), default=128, show_default=True, help="Tokens of an answer."
)
@click.option("--range-ratio", type=SHARE, default=0.0, help="Lengths vary by this share both ways.")
@click.option(
    "--shared-prefix-share", type=SHARE, default=0.0, help="Share of a prompt that others have too."
)
@click.option(
    "--num-prefixes", type=click.IntRange(1), default=1, show_default=True, help="Different beginnings."
)
@click.option("--seed", type=int, default=0, show_default=True, help="Of prompts and arrivals.")
@click.option("--ignore-eos", is_flag=True, help="Answers of full length, where the server can.")
@click.option("--extra-body", default="{}", metavar="JSON", help="Fields to add to every request.")
@click.option("--num-warmups", type=click.IntRange(0), default=1, show_default=True, help="Not measured.")
@click.option("--goodput", "goals", type=_Goal(), multiple=True, help="Count answers within, e.g. ttft:500.")
@click.option("--metric-percentiles", type=_Percentiles(), default="50,90,99", show_default=True)
@click.option("--output-json", type=click.File("w", lazy=False), help="Write the figures here; - is stdout.")
@click.option("--save-detailed", is_flag=True, help="Every request's figures too.")
def bench_serve(
    url: str,
    output_json: IO[str] | None,
    metric_percentiles: Sequence[float],
    save_detailed: bool,
    **flags: Any,
) -> None:
    """Load any OpenAI server, and time its answers.

    Open loop at --request-rate, or closed loop at --max-concurrency with the rate left infinite.
    Figures have the names that `vllm bench serve` gives them; the table goes to stderr.
    """
    from rich.console import Console

    from disagg.client import Goals, Workload, make_report, run_benchmark, table_lines
    from disagg.errors import DisaggError

    names = ("num_prompts", "input_len", "output_len", "range_ratio", "shared_prefix_share", "num_prefixes")
    workload = Workload(seed=flags["seed"], **{name: flags[name] for name in names})
    load = _make_load(url, flags)
    try:
        outcomes = asyncio.run(
            run_benchmark(
                load,
                workload,
                request_rate=flags["request_rate"],
                burstiness=flags["burstiness"],
                num_warmups=flags["num_warmups"],
                console=Console(stderr=True),
            )
        )
    except DisaggError as error:
        raise click.ClickException(str(error)) from error
    report = make_report(
        load,
        outcomes,
        request_rate=flags["request_rate"],
        burstiness=flags["burstiness"],
        percentiles=metric_percentiles,
        goals=Goals(dict(flags["goals"])) if flags["goals"] else None,
        detailed=save_detailed,
    )
    for line in table_lines(report):
        click.echo(line, err=True)
    reasons = Counter(outcome.error for outcome in outcomes if outcome.error)
    for reason, count in reasons.most_common(5):
        click.secho(f"{count} failed: {reason}", fg="red", err=True)
    if output_json is not None:
        json.dump(report, output_json, indent=1)
        output_json.write("\n")
    if not report["completed"]:
        raise SystemExit(1)


def _make_load(url: str, flags: dict[str, Any]) -> Any:
    import httpx

    from disagg.client import Load, base_url, bearer, first_model
    from disagg.errors import DisaggError

    headers = bearer(flags["api_key"])
    try:
        extra_body = json.loads(flags["extra_body"])
    except ValueError as error:
        raise click.BadParameter(f"{error}", param_hint="--extra-body") from error
    if not isinstance(extra_body, dict):
        raise click.BadParameter("must be a JSON object", param_hint="--extra-body")
    base = base_url(url)
    with httpx.Client(base_url=base, headers=headers, timeout=30, trust_env=False) as http:
        try:
            model = flags["model"] or first_model(http)
        except DisaggError as error:
            raise click.ClickException(str(error)) from error
    return Load(
        url=base,
        model=model,
        kind=flags["endpoint"],
        headers=headers,
        max_concurrency=flags["max_concurrency"],
        ignore_eos=flags["ignore_eos"],
        extra_body=extra_body,
    )
