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
    from urllib.request import HTTPSHandler, ProxyHandler, Request, build_opener

    # It never leaves this machine, whose certificate is for another name.
    context = ssl._create_unverified_context()  # noqa: S323
    # Nor may it where HTTP_PROXY is set for downloads: urllib heeds that for loopback too.
    opener = build_opener(ProxyHandler({}), HTTPSHandler(context=context))
    try:
        request = Request(f"{url.rstrip('/')}/drain", method="POST")  # noqa: S310
        with opener.open(request) as answer:
            click.echo(answer.read().decode())
    except HTTPError as error:
        raise click.ClickException(f"{url} answered {error.code}: {error.read().decode()}") from error
    except (URLError, OSError, ValueError) as error:
        raise click.ClickException(f"no answer from {url} ({error})") from error
