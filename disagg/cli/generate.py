"""`disagg generate`."""

import sys
from typing import Any

import click
from rich.console import Console

from disagg.cli.offline import OfflineConfig, load_llm
from disagg.cli.options import build, config_options
from disagg.errors import RequestError
from disagg.protocol import SamplingParams

_DEFAULTS = SamplingParams()


@click.command()
@click.argument("text")
@click.option("--chat", is_flag=True, help="Put TEXT through the model's chat template, as a user's words.")
@click.option(
    "--max-tokens", type=click.IntRange(1), default=128, show_default=True, help="Most tokens of output."
)
@click.option(
    "--temperature", type=click.FloatRange(0, 2), default=0.0, show_default=True, help="0 is greedy."
)
@click.option(
    "--top-p",
    type=click.FloatRange(0, 1, min_open=True),
    default=_DEFAULTS.top_p,
    show_default=True,
    help="Nucleus sampling.",
)
@click.option(
    "--top-k", type=click.IntRange(0), default=_DEFAULTS.top_k, show_default=True, help="0 keeps all tokens."
)
@click.option(
    "--min-p",
    type=click.FloatRange(0, 1),
    default=_DEFAULTS.min_p,
    show_default=True,
    help="Share of the likeliest token.",
)
@config_options(OfflineConfig)
def generate(text: str, chat: bool, **values: Any) -> None:
    """Continue TEXT, or what stdin holds if it is -, with one engine in this process.

    The text goes to stdout as it is made. --seed also seeds the draws.
    """
    names = ("max_tokens", "temperature", "top_p", "top_k", "min_p")
    options = {name: values.pop(name) for name in names}
    config = build(OfflineConfig, values)
    if text == "-":
        text = sys.stdin.read().rstrip("\n")
    if not text:
        raise click.BadParameter("is empty", param_hint="TEXT")
    llm = load_llm(config, Console(stderr=True))
    try:
        prompt = llm.encode_chat([{"role": "user", "content": text}]) if chat else llm.encode(text)
        for piece in llm.stream(prompt, SamplingParams(seed=config.model.seed, **options)):
            sys.stdout.write(piece)
            sys.stdout.flush()
    except RequestError as error:
        raise click.UsageError(error.message) from error
    sys.stdout.write("\n")
