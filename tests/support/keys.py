"""Key folders as Kubernetes mounts them: each version a folder of its own, swapped in by a link."""

import hashlib
import shutil
from pathlib import Path


def secret(name: str) -> bytes:
    """32 bytes that are the same for the same name."""
    return hashlib.sha256(name.encode()).digest()


class KeyFolder:
    """A mounted Secret; `write(current="a", next="b")` replaces the whole of it at once."""

    def __init__(self, path: Path, **names: str) -> None:
        self.path = path
        self._version = 0
        path.mkdir()
        self.write(**names)

    def write(self, **names: str) -> None:
        self.write_raw(**{file: secret(name) for file, name in names.items()})

    def write_raw(self, **contents: bytes) -> None:
        old, self._version = self._version, self._version + 1
        version = self.path / f"..{self._version}"
        version.mkdir()
        for file, content in contents.items():
            (version / file).write_bytes(content)
        (self.path / "..data_tmp").symlink_to(version.name)
        (self.path / "..data_tmp").rename(self.path / "..data")
        for file in ("current", "next", "previous"):
            (self.path / file).unlink(missing_ok=True)
            if file in contents:
                (self.path / file).symlink_to(f"..data/{file}")
        if old:
            shutil.rmtree(self.path / f"..{old}")
