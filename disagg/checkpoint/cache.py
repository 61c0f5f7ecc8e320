"""A folder made once and then only read, whoever asks first.

`build_once` gives every process the same finished folder: it is built beside its final place,
made durable, and renamed into it; a file lock keeps a second process from building the same. A
manifest tells a whole folder from one that lost bytes, which is then built again.
"""

import fcntl
import hashlib
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from msgspec import DecodeError, Struct, ValidationError
from msgspec.json import decode, encode

from disagg.errors import ConfigError

MANIFEST_NAME = "manifest.json"

# Enough to notice a file that was cut, replaced or zeroed, in about 10 ms whatever its size.
SAMPLES, SAMPLE_BYTES = 256, 64 * 1024


class FileFacts(Struct, frozen=True):
    """What a finished file looked like."""

    num_bytes: int
    fingerprint: str


def cache_root() -> Path:
    """Where converted checkpoints live: `$XDG_CACHE_HOME` or `~/.cache`, then `disagg/checkpoints`."""
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "disagg" / "checkpoints"


def fingerprint(path: Path) -> str:
    """A digest of a file's size and of evenly spread samples, the first and last bytes among them.

    Files up to 16 MiB are read whole. Of larger ones a change that keeps the size and misses every
    sample goes unnoticed.
    """
    size = path.stat().st_size
    digest = hashlib.sha256(str(size).encode())
    with path.open("rb") as file:
        if size <= SAMPLES * SAMPLE_BYTES:
            digest.update(file.read())
        else:
            for i in range(SAMPLES):
                file.seek((size - SAMPLE_BYTES) * i // (SAMPLES - 1))
                digest.update(file.read(SAMPLE_BYTES))
    return digest.hexdigest()


def build_once(root: Path, key: str, build: Callable[[Path], None]) -> Path:
    """The folder `root/key`, built by `build(empty folder)` unless it is there and whole.

    Waits while another process builds the same. Whatever a killed builder left is removed.

    Raises:
        ConfigError: the cache cannot be written. Errors of `build` pass through.
    """
    folder = root / key
    if is_whole(folder):
        return folder
    try:
        root.mkdir(parents=True, exist_ok=True)
        with _locked(root / f"{key}.lock"):
            if not is_whole(folder):
                _rebuild(root, key, build)
    except OSError as e:
        raise ConfigError(
            f"the checkpoint cache {root} (from XDG_CACHE_HOME or ~/.cache) cannot be written: {e}"
        ) from e
    return folder


def is_whole(folder: Path) -> bool:
    """Whether a folder's files are those its manifest names, by size and fingerprint."""
    try:
        manifest = decode((folder / MANIFEST_NAME).read_bytes(), type=dict[str, FileFacts])
        return bool(manifest) and all(_facts(folder / name) == facts for name, facts in manifest.items())
    except (OSError, DecodeError, ValidationError):
        return False


def _rebuild(root: Path, key: str, build: Callable[[Path], None]) -> None:
    """Build beside the final place, then rename. Requires the lock, so what lies there is stale."""
    for stale in root.glob(f"{key}.*.tmp"):
        shutil.rmtree(stale)
    partial = root / f"{key}.{os.getpid()}.tmp"
    partial.mkdir()
    try:
        build(partial)
        files = sorted(partial.iterdir())
        manifest = {path.name: _facts(path) for path in files}
        (partial / MANIFEST_NAME).write_bytes(encode(manifest))
        # Without this, a power cut after the rename could leave names without their bytes.
        for path in (*files, partial / MANIFEST_NAME, partial):
            _sync(path)
        folder = root / key
        if folder.exists():
            shutil.rmtree(folder)
        partial.rename(folder)
        _sync(root)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _facts(path: Path) -> FileFacts:
    return FileFacts(path.stat().st_size, fingerprint(path))


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Hold an exclusive lock that ends with the process, however it ends."""
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)
