"""Which keys the API takes, and when a file with them counts."""

from pathlib import Path

import pytest

from disagg.errors import ConfigError
from disagg.security import ApiKeys
from support.clock import FakeClock


@pytest.fixture
def file(tmp_path: Path) -> Path:
    file = tmp_path / "keys"
    file.write_text("# of team one\nalpha\n\n  beta  \n")
    return file


def test_without_keys_none_is_needed() -> None:
    assert not ApiKeys().is_needed
    assert not ApiKeys().accept(b"")


def test_keys_of_a_file_count_like_those_given(file: Path) -> None:
    keys = ApiKeys(("given",), file)
    assert keys.is_needed
    assert all(map(keys.accept, (b"given", b"alpha", b"beta")))
    assert not any(map(keys.accept, (b"", b"# of team one", b"gamma", b"alph", b"alphaa", b"\xff")))


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "it has no key"),
        (b"# only\n\n", "it has no key"),
        (b"good\nnot good\n", "line 2 is no key"),
        ("schlüssel".encode(), "line 1 is no key"),
        (None, "No such file"),
    ],
)
def test_a_bad_file_at_start_is_a_wrong_configuration(file: Path, content: bytes | None, reason: str) -> None:
    if content is None:
        file.unlink()
    else:
        file.write_bytes(content)
    with pytest.raises(ConfigError, match=f"api_key_file '{file}' cannot be used: .*{reason}") as error:
        ApiKeys((), file)
    assert "good" not in str(error.value)


def test_a_changed_file_counts_within_a_second(file: Path) -> None:
    clock = FakeClock()
    keys = ApiKeys((), file, clock)
    file.write_text("gamma\n")
    assert keys.accept(b"alpha"), "read at most once a second"
    clock.advance(1.0)
    assert keys.accept(b"gamma")
    assert not keys.accept(b"alpha")


@pytest.mark.parametrize("damage", [None, b"", b"not good\n"])
def test_a_file_that_breaks_later_keeps_the_old_keys_and_is_told_once(
    file: Path, caplog: pytest.LogCaptureFixture, damage: bytes | None
) -> None:
    """Emptied by mistake it must not open the door to everybody, nor shut it."""
    clock = FakeClock()
    keys = ApiKeys((), file, clock)
    if damage is None:
        file.unlink()
    else:
        file.write_bytes(damage)
    for _ in range(3):
        clock.advance(5.0)
        assert keys.is_needed
        assert keys.accept(b"alpha")
        assert not keys.accept(b"")
    assert len(caplog.messages) == 1
    assert f"api_key_file '{file}' cannot be used" in caplog.text
    file.write_text("gamma\n")
    clock.advance(5.0)
    assert keys.accept(b"gamma")
    assert not keys.accept(b"alpha")
