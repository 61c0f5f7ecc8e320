"""Which certificate a handshake gets; in memory, without sockets."""

import ssl
from collections.abc import Callable
from pathlib import Path

import pytest

from disagg.errors import ConfigError
from disagg.security import tls_context
from support.certificates import FOLDER, Certificate, trusted
from support.clock import FakeClock


def is_trusted(server: ssl.SSLContext, name: str, host: str = "localhost") -> bool:
    """Shake hands as a client that trusts only the certificate `name`."""
    to_server, to_client = ssl.MemoryBIO(), ssl.MemoryBIO()
    client = ssl.create_default_context(cafile=trusted(name)).wrap_bio(
        to_client, to_server, server_hostname=host
    )
    served = server.wrap_bio(to_server, to_client, server_side=True)
    try:
        while not (step(client.do_handshake) & step(served.do_handshake)):
            pass
    except ssl.SSLCertVerificationError:
        return False
    return True


def step(handshake: Callable[[], None]) -> bool:
    try:
        handshake()
    except ssl.SSLWantReadError:
        return False
    return True


@pytest.fixture
def files(tmp_path: Path) -> Certificate:
    return Certificate(tmp_path, "one")


@pytest.mark.parametrize("host", ["localhost", "127.0.0.1"])
def test_a_renewed_certificate_is_used_without_restart(files: Certificate, host: str) -> None:
    """Also by clients that name no host in the handshake, as those that connect to an address."""
    clock = FakeClock()
    context = tls_context(files.certificate, files.key, clock)
    assert is_trusted(context, "one", host)
    files.write("two")
    clock.advance(1.0)
    assert is_trusted(context, "two", host)
    assert not is_trusted(context, "one", host)


def test_files_that_are_no_pair_keep_the_old_certificate(
    files: Certificate, caplog: pytest.LogCaptureFixture
) -> None:
    clock = FakeClock()
    context = tls_context(files.certificate, files.key, clock)
    files.write("two", key="one")
    for _ in range(3):
        clock.advance(5.0)
        assert is_trusted(context, "one")
    files.key.unlink()
    clock.advance(5.0)
    assert is_trusted(context, "one")
    assert ["cannot be used, what there was stays" in message for message in caplog.messages] == [True, True]
    files.write("two")
    clock.advance(5.0)
    assert is_trusted(context, "two")


def test_files_that_cannot_be_used_are_a_wrong_configuration(files: Certificate, tmp_path: Path) -> None:
    files.write("two", key="one")
    with pytest.raises(ConfigError, match=r"tls_certificate .* with tls_key .* cannot be used: .*MISMATCH"):
        tls_context(files.certificate, files.key)
    with pytest.raises(ConfigError, match="No such file"):
        tls_context(tmp_path / "none", files.key)


def test_a_key_with_a_password_is_refused_and_not_asked_for(files: Certificate) -> None:
    files.key.write_bytes((FOLDER / "encrypted.key").read_bytes())
    with pytest.raises(ConfigError, match="the key has a password"):
        tls_context(files.certificate, files.key)
