"""TLS of a server whose certificate is renewed while it runs."""

import ssl
import time
from collections.abc import Callable
from pathlib import Path

from disagg.errors import ConfigError
from disagg.security.reloaded import Reloaded


def tls_context(certificate: Path, key: Path, clock: Callable[[], float] = time.monotonic) -> ssl.SSLContext:
    """Make a context whose handshakes use the files as they are then.

    Each version of the files gets a context of its own, which is whole or not there: a certificate loaded
    into one that is in use, and a key that does not fit it, would leave it with neither.

    Args:
        certificate: PEM, the server's own first, then those that lead to a root.
        key: PEM without a password.
        clock: Seconds.

    Raises:
        ConfigError: the files are missing or no pair.
    """

    def read() -> tuple[bytes, bytes]:
        return certificate.read_bytes(), key.read_bytes()

    def make(_: tuple[bytes, bytes]) -> ssl.SSLContext:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(certificate, key, password=_no_password)
        return context

    what = f"tls_certificate {str(certificate)!r} with tls_key {str(key)!r}"
    try:
        newest = Reloaded(what, read, make, clock=clock)
    except (OSError, ValueError) as error:
        raise ConfigError(f"{what} cannot be used: {error}") from error

    def renew(connection: ssl.SSLObject | ssl.SSLSocket, name: str | None, context: ssl.SSLContext) -> None:
        """Called in every handshake, also in those that name no host."""
        del name, context
        connection.context = newest.get()

    served = make(read())
    served.sni_callback = renew
    return served


def _no_password() -> str:
    """Without it OpenSSL would ask for one on the terminal."""
    raise ValueError("the key has a password")
