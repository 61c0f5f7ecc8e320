"""`disagg chat`."""

import sys
from functools import partial
from typing import Any

import click


@click.command()
@click.argument("url", default="http://127.0.0.1:8000", envvar="DISAGG_URL")
@click.option("--model", help="Served model; by default the server's first.")
@click.option("--system", help="Instructions that the conversation begins with.")
@click.option("--api-key", envvar=["DISAGG_API_KEY", "OPENAI_API_KEY"], help="Key that the server asks for.")
@click.option("--temperature", type=click.FloatRange(0, 2), help="0 is greedy; by default the server's.")
@click.option("--top-p", type=click.FloatRange(0, 1), help="Share of likely tokens to draw from.")
@click.option("--max-tokens", type=click.IntRange(1), help="Longest answer, tokens.")
@click.option("--seed", type=int, help="The same seed gives the same answers.")
def chat(url: str, model: str | None, system: str | None, api_key: str | None, **options: Any) -> None:
    """Talk to a running server in the terminal.

    URL is any OpenAI server, by default the one that `disagg serve` starts. Lines may also be piped
    in: each is a question of the same conversation, and one that fails makes the status 1.
    """
    import httpx

    from disagg.client import ChatServer, Conversation, base_url, bearer, first_model, run_chat
    from disagg.errors import DisaggError

    to_server: dict[str, Any] = {
        "base_url": base_url(url),
        "headers": bearer(api_key),
        # An answer may take long to begin behind a queue, but a server that is not there says so at once.
        "timeout": httpx.Timeout(None, connect=5.0),
        "trust_env": False,
    }
    try:
        if model is None:
            with httpx.Client(**to_server) as http:
                model = first_model(http)
    except DisaggError as error:
        raise click.ClickException(f"{error}. `disagg serve` starts a server.") from error
    given = {name: value for name, value in options.items() if value is not None}
    server = ChatServer(partial(httpx.AsyncClient, **to_server), model, given)
    if sys.stdin.isatty():
        click.secho(f"{server.model} at {base_url(url)}; /help lists the commands.", dim=True, err=True)
    num_failed = run_chat(server, Conversation(system), _terminal())
    if num_failed and not sys.stdin.isatty():
        raise SystemExit(1)


def _terminal() -> Any:
    from disagg.client.chat import Terminal

    interactive = sys.stdin.isatty()
    if interactive:
        import readline  # noqa: F401  (gives input() its history and editing)

    def read() -> str:
        return input("\n> " if interactive else "")

    def write(text: str) -> None:
        sys.stdout.write(text)
        sys.stdout.flush()

    def note(text: str) -> None:
        click.secho(text, dim=True, err=True)

    return Terminal(read=read, write=write, note=note)
