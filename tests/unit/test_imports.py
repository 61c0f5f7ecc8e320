"""Who may import whom. Read from the source, so that a late import counts too."""

import ast
import importlib
import inspect
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import disagg

ROOT = Path(disagg.__file__).parent
LAYERS = {
    "errors": set(),
    "protocol": {"errors"},
    "config": {"errors"},
    "checkpoint": {"errors"},
    "telemetry": set(),
    "security": {"errors", "telemetry"},
    "links": {"errors", "protocol", "security", "telemetry"},
    "kv": {"_core", "errors", "protocol"},
    "layers": {"_cpu", "_cuda", "errors", "kv"},
    "nccl": {"errors"},
    "parallel": {"errors", "nccl"},
    "attention": {"_cpu", "_cuda", "errors", "kv", "layers"},
    "models": {"attention", "checkpoint", "errors", "kv", "layers", "parallel", "protocol"},
    "engine": {
        "attention",
        "checkpoint",
        "config",
        "errors",
        "kv",
        "layers",
        "models",
        "nccl",
        "parallel",
        "protocol",
    },
    "transfer": {"_cuda", "errors", "kv", "nccl", "protocol"},
    "client": {"errors"},
    "frontend": {"checkpoint", "config", "errors", "protocol", "security"},
    "kubernetes": {"errors", "security", "telemetry"},
    "router": {
        "_core",
        "checkpoint",
        "config",
        "errors",
        "frontend",
        "kubernetes",
        "links",
        "protocol",
        "security",
        "telemetry",
    },
    "supervisor": {"checkpoint", "config", "errors", "security"},
}
TORCH_FREE = [
    "nccl",
    "client",
    "protocol",
    "config",
    "errors",
    "checkpoint",
    "telemetry",
    "security",
    "links",
    "frontend",
    "kubernetes",
    "router",
    "supervisor",
]
OWNERS = {
    "kubernetes": {"kubernetes/client.py"},
    "nixl": {"transfer/nixl.py"},
    "flashinfer": {"attention/flashinfer.py", "attention/flashinfer_kernels.py"},
}


def imports_of(path: Path) -> Iterator[str]:
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module and node.level == 0:
            yield node.module
        elif isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)


def files_of(part: str) -> list[Path]:
    folder = ROOT / part
    return sorted(folder.rglob("*.py")) if folder.is_dir() else [ROOT / f"{part}.py"]


@pytest.mark.parametrize("part", LAYERS)
def test_imports_point_one_way(part: str) -> None:
    for path in files_of(part):
        for name in imports_of(path):
            first, _, rest = name.partition(".")
            if first == "disagg" and rest:
                assert rest.split(".")[0] in LAYERS[part] | {part}, f"{path.relative_to(ROOT)} imports {name}"


@pytest.mark.parametrize("part", TORCH_FREE)
def test_the_router_side_never_names_torch(part: str) -> None:
    """Start-up in a fraction of a second and a small process depend on it."""
    for path in files_of(part):
        assert not {"torch", "transformers"} & {name.partition(".")[0] for name in imports_of(path)}, path


@pytest.mark.parametrize("part", sorted(path.parent.name for path in ROOT.glob("*/__init__.py")))
def test_all_lists_what_a_package_offers(part: str) -> None:
    """What is not listed is nobody else's business."""
    package = importlib.import_module(f"disagg.{part}")
    names = {name for name, value in vars(package).items() if not inspect.ismodule(value)}
    assert {name for name in names if not name.startswith("_")} == set(package.__all__)


@pytest.mark.parametrize("library", OWNERS)
def test_a_foreign_library_shows_in_one_file(library: str) -> None:
    users = {
        str(path.relative_to(ROOT))
        for path in ROOT.rglob("*.py")
        if any(name.partition(".")[0] == library for name in imports_of(path))
    }
    assert users <= OWNERS[library]


def test_nothing_imports_what_the_images_leave_out() -> None:
    """Compilers in Python's clothes, and what is for tests alone."""
    for path in ROOT.rglob("*.py"):
        assert not {"triton", "cutlass", "transformers"} & {
            name.partition(".")[0] for name in imports_of(path)
        }, path


def test_nothing_pickles() -> None:
    """A pickle on a socket runs the sender's code; torch's object collectives pickle too."""
    for path in ROOT.rglob("*.py"):
        assert "pickle" not in {name.partition(".")[0] for name in imports_of(path)}, path
        assert not {"recv_pyobj", "send_pyobj", "broadcast_object_list", "all_gather_object"} & set(
            node.attr for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Attribute)
        ), path


def test_importing_the_package_does_not_import_torch() -> None:
    code = "import disagg, disagg.protocol, disagg.config, sys; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
