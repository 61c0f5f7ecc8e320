"""A folder built once: whole or not there, whoever asks and whoever dies."""

import fcntl
import os
import threading
from pathlib import Path

import pytest

from disagg.checkpoint.cache import build_once, cache_root, fingerprint, is_whole
from disagg.errors import ConfigError


def fill(folder: Path) -> None:
    (folder / "a").write_bytes(b"first")
    (folder / "b").write_bytes(b"second")


def never(folder: Path) -> None:
    raise AssertionError("built again")


def test_it_is_built_once(tmp_path: Path) -> None:
    folder = build_once(tmp_path, "key", fill)
    assert (folder / "a").read_bytes() == b"first"
    assert build_once(tmp_path, "key", never) == folder


@pytest.mark.parametrize("damage", ["cut", "changed", "gone", "manifest"])
def test_a_damaged_folder_is_built_again(tmp_path: Path, damage: str) -> None:
    """A disk that was full or a power cut leaves files that are there but not whole."""
    folder = build_once(tmp_path, "key", fill)
    if damage == "gone":
        (folder / "b").unlink()
    elif damage == "manifest":
        (folder / "manifest.json").write_text("{")
    else:
        (folder / "b").write_bytes(b"secon" if damage == "cut" else b"sEcond")
    assert not is_whole(folder)
    assert (build_once(tmp_path, "key", fill) / "b").read_bytes() == b"second"


def test_a_build_that_fails_leaves_nothing(tmp_path: Path) -> None:
    def fail(folder: Path) -> None:
        (folder / "a").write_bytes(b"half")
        raise ConfigError("no")

    with pytest.raises(ConfigError, match="no"):
        build_once(tmp_path, "key", fail)
    assert [path.name for path in tmp_path.iterdir()] == ["key.lock"]


def test_what_a_killed_builder_left_is_removed(tmp_path: Path) -> None:
    stale = tmp_path / "key.1234.tmp"
    stale.mkdir()
    (stale / "a").write_bytes(b"half")
    build_once(tmp_path, "key", fill)
    assert not stale.exists()


def test_a_second_asker_waits_and_builds_nothing(tmp_path: Path) -> None:
    """Prefill and decode worker start at the same moment; the model is converted by one of them."""
    building, go_on = threading.Event(), threading.Event()

    def slow(folder: Path) -> None:
        building.set()
        assert go_on.wait(10)
        fill(folder)

    first = threading.Thread(target=build_once, args=(tmp_path, "key", slow))
    first.start()
    assert building.wait(10)
    lock = os.open(tmp_path / "key.lock", os.O_RDWR)
    with pytest.raises(BlockingIOError):
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    os.close(lock)
    second = threading.Thread(target=build_once, args=(tmp_path, "key", never))
    second.start()
    go_on.set()
    first.join(10)
    second.join(10)
    assert not first.is_alive()
    assert not second.is_alive()
    assert is_whole(tmp_path / "key")


def test_a_cache_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match=r"the checkpoint cache .*file/cache .* cannot be written"):
        build_once(tmp_path / "file" / "cache", "key", fill)


def test_the_root_follows_xdg(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert cache_root() == tmp_path / "disagg" / "checkpoints"


def test_a_fingerprint_tells_large_files_of_one_size_apart(tmp_path: Path) -> None:
    path = tmp_path / "large"
    with path.open("wb") as file:
        file.truncate(17 * 1024 * 1024)
    zeros = fingerprint(path)
    with path.open("r+b") as file:
        file.seek(-1, os.SEEK_END)
        file.write(b"x")
    assert fingerprint(path) != zeros
