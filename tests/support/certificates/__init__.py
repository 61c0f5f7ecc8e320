"""Two self-signed certificates of localhost and 127.0.0.1 with their keys, for tests alone."""

from pathlib import Path

FOLDER = Path(__file__).parent


class Certificate:
    """Files as a server has them; `write` replaces them by those of `one` or `two`."""

    def __init__(self, folder: Path, name: str) -> None:
        self.certificate = folder / "tls.crt"
        self.key = folder / "tls.key"
        self.write(name)

    def write(self, certificate: str, key: str | None = None) -> None:
        """Write a certificate and its key, or another's."""
        self.certificate.write_bytes((FOLDER / f"{certificate}.pem").read_bytes())
        self.key.write_bytes((FOLDER / f"{key or certificate}.key").read_bytes())


def trusted(name: str) -> str:
    """What a client that trusts only this certificate loads."""
    return str(FOLDER / f"{name}.pem")
