"""Which keys there are, and which one a client tries."""

import itertools
import logging
from pathlib import Path

import pytest
from zmq.utils import z85

from disagg.errors import ConfigError
from disagg.security import KeyChoice, KeyPair, KeyRing
from support.clock import FakeClock
from support.keys import KeyFolder, secret


def pair(name: str) -> KeyPair:
    return KeyPair.from_secret(secret(name))


@pytest.fixture
def clock() -> FakeClock:
    return FakeClock()


def test_the_public_half_is_derived() -> None:
    """Bob's keys of RFC 7748, section 6.1."""
    bob = KeyPair.from_secret(
        bytes.fromhex("5dab087e624a8a4b79e17f8b83800ee66f3bb1292618b6fd1c2f8b27ff88e0eb")
    )
    assert z85.decode(bob.public).hex() == "de9edb7d7b7dc1b4d35b61c2ece435373f8343c85b78674dadfc7e146f882b4f"


def test_keys_come_in_the_order_they_are_tried_each_once(tmp_path: Path, clock: FakeClock) -> None:
    folder = KeyFolder(tmp_path / "keys", previous="a", next="c", current="b")
    assert KeyRing(folder.path, clock).pairs() == (pair("b"), pair("c"), pair("a"))
    folder.write(current="b", previous="b")
    assert KeyRing(folder.path, clock).pairs() == (pair("b"),)


def test_plain_files_are_keys_too(tmp_path: Path, clock: FakeClock) -> None:
    (tmp_path / "current").write_bytes(secret("a"))
    (tmp_path / "next").write_bytes(secret("b"))
    assert KeyRing(tmp_path, clock).pairs() == (pair("a"), pair("b"))


@pytest.mark.parametrize(
    ("contents", "reason"),
    [
        ({}, "No such file"),
        ({"next": secret("a")}, "No such file"),
        ({"current": b"short"}, "current must have 32 bytes, got 5"),
        ({"current": secret("a") + b"\n"}, "current must have 32 bytes, got 33"),
        ({"current": secret("a"), "previous": b""}, "previous must have 32 bytes, got 0"),
    ],
)
def test_a_folder_without_usable_keys_is_a_wrong_configuration(
    tmp_path: Path, contents: dict[str, bytes], reason: str
) -> None:
    folder = KeyFolder(tmp_path / "keys")
    folder.write_raw(**contents)
    with pytest.raises(ConfigError, match=rf"transport_keys '{folder.path}' cannot be used: .*{reason}"):
        KeyRing(folder.path)


def test_a_change_shows_without_restart_and_the_own_key_stays(tmp_path: Path, clock: FakeClock) -> None:
    folder = KeyFolder(tmp_path / "keys", current="a")
    ring = KeyRing(folder.path, clock)
    folder.write(current="b", previous="a")
    assert not ring.accepts(pair("b").public), "read at most once a second"
    clock.advance(1.0)
    assert ring.accepts(pair("b").public)
    assert ring.accepts(pair("a").public)
    assert not ring.accepts(pair("c").public)
    assert ring.own == pair("a")
    folder.write(current="b")
    clock.advance(1.0)
    assert not ring.accepts(pair("a").public)


@pytest.mark.parametrize("damage", [{}, {"current": b"x"}, {"current": secret("b"), "next": b""}])
def test_a_folder_that_breaks_later_changes_nothing_and_is_told_once(
    tmp_path: Path, clock: FakeClock, caplog: pytest.LogCaptureFixture, damage: dict[str, bytes]
) -> None:
    folder = KeyFolder(tmp_path / "keys", current="a", next="b")
    ring = KeyRing(folder.path, clock)
    folder.write_raw(**damage)
    for _ in range(3):
        clock.advance(5.0)
        assert ring.pairs() == (pair("a"), pair("b"))
    assert len(caplog.messages) == 1
    assert "what there was stays" in caplog.text
    folder.write(current="b")
    clock.advance(5.0)
    assert ring.pairs() == (pair("b"),)


def test_a_process_whose_own_key_was_dropped_says_that_nobody_can_reach_it(
    tmp_path: Path, clock: FakeClock, caplog: pytest.LogCaptureFixture
) -> None:
    folder = KeyFolder(tmp_path / "keys", current="a")
    ring = KeyRing(folder.path, clock)
    folder.write(current="b")
    clock.advance(5.0)
    with caplog.at_level(logging.ERROR):
        ring.pairs()
        clock.advance(5.0)
        ring.pairs()
    assert [message for message in caplog.messages if "restart it" in message] == caplog.messages
    assert len(caplog.messages) == 1


def test_secrets_show_in_no_repr(tmp_path: Path) -> None:
    shown = repr(KeyRing(KeyFolder(tmp_path / "keys", current="a").path).own)
    assert pair("a").public.decode() in shown
    assert pair("a").secret.decode() not in shown


def test_a_client_tries_each_key_once_a_round(tmp_path: Path, clock: FakeClock) -> None:
    choice = KeyChoice(KeyRing(KeyFolder(tmp_path / "keys", current="b", next="c", previous="a").path, clock))
    for _ in range(2):
        tried = []
        is_over = False
        while not is_over:
            tried.append(choice.take())
            is_over = choice.on_refused()
        assert tried == [pair("b"), pair("c"), pair("a")]


def test_a_client_begins_with_the_key_that_worked_last(tmp_path: Path, clock: FakeClock) -> None:
    folder = KeyFolder(tmp_path / "keys", current="b", previous="a")
    choice = KeyChoice(KeyRing(folder.path, clock))
    assert choice.take() == pair("b")
    assert not choice.on_refused()
    assert choice.take() == pair("a")
    choice.on_accepted()
    assert choice.take() == pair("a")
    assert not choice.on_refused()
    assert choice.take() == pair("b")
    assert choice.on_refused()
    folder.write(current="c")
    clock.advance(1.0)
    assert choice.take() == pair("c"), "one that worked and is gone is not tried"


def connects(server: KeyRing, client: KeyRing) -> bool:
    """What ZeroMQ and ZAP make of the two rings, as of now."""
    choice = KeyChoice(client)
    while True:
        tried = choice.take()
        if tried.public == server.own.public and server.accepts(tried.public):
            return True
        if choice.on_refused():
            return False


STEPS: list[dict[str, str]] = [
    {"current": "a"},
    {"current": "a", "next": "b"},
    {"current": "b", "previous": "a"},
    {"current": "b"},
]


def test_every_two_processes_can_connect_at_every_moment_of_a_rotation(
    tmp_path: Path, clock: FakeClock
) -> None:
    """Folders of two pods are a step apart at most; all have restarted before `previous` is dropped."""
    servers = [(start, seen) for start in range(4) for seen in range(start, 4)]
    for number, ((start, seen), client_seen) in enumerate(itertools.product(servers, range(4))):
        restarted_too_late = STEPS[start]["current"] == "a" and 3 in (seen, client_seen)
        if abs(seen - client_seen) > 1 or restarted_too_late:
            continue
        server_folder = KeyFolder(tmp_path / f"s{number}", **STEPS[start])
        server = KeyRing(server_folder.path, clock)
        server_folder.write(**STEPS[seen])
        client = KeyRing(KeyFolder(tmp_path / f"c{number}", **STEPS[client_seen]).path, clock)
        clock.advance(1.0)
        assert connects(server, client), (start, seen, client_seen)
