"""`disagg drain`."""

import click


@click.command()
@click.argument("url", default="http://127.0.0.1:8080", envvar="DISAGG_URL")
def drain(url: str) -> None:
    """Have a process on this machine take nothing new, and wait for its end.

    URL is the HTTP port of a worker or router, for which this returns when it holds nothing any more or
    its drain time is up. A router leads its clients elsewhere first; it serves until it gets SIGTERM.
    """
    import ssl
    from urllib.error import HTTPError, URLError
    from urllib.request import Request, urlopen

    # It never leaves this machine, whose certificate is for another name.
    context = ssl._create_unverified_context()  # noqa: S323
    try:
        request = Request(f"{url.rstrip('/')}/drain", method="POST")  # noqa: S310
        with urlopen(request, context=context) as answer:  # noqa: S310
            click.echo(answer.read().decode())
    except HTTPError as error:
        raise click.ClickException(f"{url} answered {error.code}: {error.read().decode()}") from error
    except (URLError, OSError, ValueError) as error:
        raise click.ClickException(f"no answer from {url} ({error})") from error
