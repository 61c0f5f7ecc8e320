"""From what the user calls a model to its files, without a network."""

import os
import tempfile
from pathlib import Path

import pytest

from disagg.checkpoint import resolve
from disagg.errors import ConfigError
from support.checkpoints import make_checkpoint
from support.gguf_files import write_gguf


@pytest.fixture(autouse=True)
def own_caches(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


@pytest.fixture
def gguf(tmp_path: Path) -> Path:
    tokenizer = (make_checkpoint(tmp_path / "source") / "tokenizer.json").read_text()
    path = tmp_path / "files" / "tiny.gguf"
    path.parent.mkdir()
    write_gguf(path, tokenizer_json=tokenizer)
    return path


def test_a_folder_is_used_as_it_is(tmp_path: Path) -> None:
    folder = make_checkpoint(tmp_path / "m")
    files = resolve(str(folder))
    assert files.path == folder
    assert files.name == str(folder)


def test_a_gguf_is_converted_once(gguf: Path) -> None:
    told: list[tuple[int, int]] = []
    files = resolve(str(gguf), progress=lambda done, total: told.append((done, total)))
    assert told[-1][0] == told[-1][1] > 0
    assert [done for done, _ in told] == sorted(done for done, _ in told)
    assert {"config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json"} < {
        path.name for path in files.path.iterdir()
    }
    told.clear()
    assert resolve(str(gguf), progress=lambda done, total: told.append((done, total))) == files
    assert not told


def test_a_folder_with_one_gguf_is_that_gguf(gguf: Path) -> None:
    assert resolve(str(gguf.parent)).path == resolve(str(gguf)).path


def test_an_edited_gguf_is_converted_again(gguf: Path) -> None:
    before = resolve(str(gguf)).path
    os.utime(gguf, ns=(1, 1))
    assert resolve(str(gguf)).path != before


@pytest.mark.parametrize(
    ("gone", "message"),
    [
        ("config.json", "lacks config.json"),
        ("tokenizer.json", "lacks tokenizer.json"),
        ("model.safetensors", "lacks weights"),
    ],
)
def test_a_folder_that_lacks_something_is_refused_by_name(tmp_path: Path, gone: str, message: str) -> None:
    folder = make_checkpoint(tmp_path / "m")
    (folder / gone).unlink()
    with pytest.raises(ConfigError, match=message):
        resolve(str(folder), origin="--model")


@pytest.mark.parametrize(
    ("model", "message"),
    [
        ("/does/not/exist", "does not exist"),
        ("./missing.gguf", "does not exist"),
        ("not an id", "is neither a folder, a .gguf file nor a Hugging Face id"),
        ("a/b/c", "is neither a folder"),
    ],
)
def test_what_is_no_model_is_refused(model: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        resolve(model)


def test_another_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "model.bin").write_bytes(b"")
    with pytest.raises(ConfigError, match=r"is a file, but not a .gguf one"):
        resolve(str(tmp_path / "model.bin"))


def test_an_id_that_cannot_be_fetched_says_what_was_tried(monkeypatch: pytest.MonkeyPatch) -> None:
    def unreachable(*args: object, **options: object) -> str:
        raise OSError("no route to host")

    monkeypatch.setattr("huggingface_hub.snapshot_download", unreachable)
    with pytest.raises(
        ConfigError, match=r"not in the Hugging Face cache, and could not .* no route to host"
    ):
        resolve("someone/no-such-model-of-ours")


def test_a_snapshot_in_the_hub_cache_needs_no_network(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = make_checkpoint(tmp_path / "snapshot")
    monkeypatch.setattr(
        "huggingface_hub.try_to_load_from_cache", lambda model, file: str(folder / file), raising=True
    )
    assert resolve("someone/model").path == folder


def test_files_that_may_not_be_read_end_in_a_sentence() -> None:
    """A claim whose owner is another user: the pod must say so, not break."""
    with tempfile.TemporaryDirectory() as top:
        folder = make_checkpoint(Path(top) / "model")
        hidden = next(folder.glob("*.safetensors"))
        hidden.chmod(0)
        Path(top).chmod(0o755)
        was = os.geteuid()
        os.seteuid(was or 65534)  # root may read everything
        try:
            with pytest.raises(ConfigError, match=rf"may not be read: .*{hidden.name} is not ours"):
                resolve(str(folder))
        finally:
            os.seteuid(was)
