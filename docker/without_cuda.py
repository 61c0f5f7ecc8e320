"""Take the CUDA libraries out of an installed torch whose only wheel to be had is the CUDA one.

Usage: without_cuda.py SITE_PACKAGES. On a machine without a GPU torch calls none of them, but its
own libraries name them, so the loader wants every library and every symbol. One small library that
defines the symbols takes the place of them all: 4 GB become 20 kB. The CUDA run time itself (700 kB)
stays, for torch asks it how many GPUs there are. Needs `cc` and `readelf`; run at image build only.
"""

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path

STUB = "libdisagg_no_cuda.so"
KEPT = "libcudart.so.13"
CUDA_LIBRARY = re.compile(r"lib(torch_cuda|torch_nvshmem|cu(?!dart)|nccl|nvshmem)")
CUDA_FUNCTION = re.compile(r"(cupti|cuFile|cudnn)[A-Z]")
SYSTEM = ("GLIBC", "GCC", "CXXABI")
REMOVED_LIBRARIES = (
    "libtorch_cuda.so",
    "libtorch_cuda_linalg.so",
    "libtorch_nvshmem.so",
    "libcaffe2_nvrtc.so",
)
REMOVED_PACKAGES = ("nvidia", "nvidia_*", "nixl_ep*")
REMOVED_OF_TORCH = ("include", "share", "testing/_internal/generated", "bin/proto*", "lib/*.a")


def main() -> None:
    """Replace the libraries of `sys.argv[1]`, then remove what nothing loads any more."""
    site = Path(sys.argv[1])
    folder = site / "torch" / "lib"
    removed = [folder / name for name in REMOVED_LIBRARIES]
    kept = [path for path in (*folder.glob("*.so*"), *folder.parent.glob("*.so")) if path not in removed]
    wanted = {symbol for library in kept for symbol in _symbols(library, defined=False)}
    present = {name for library in kept for name, _ in _symbols(library, defined=True)}
    offered = {name for library in removed for name, _ in _symbols(library, defined=True)}
    replaced = {name for library in kept for name in _needed(library) if CUDA_LIBRARY.match(name)} - {KEPT}
    ours = {name for name, _ in wanted if name in offered or CUDA_FUNCTION.match(name)} - present
    _build_stub(
        folder, {name: tag for name, tag in sorted(wanted) if name in ours and not tag.startswith(SYSTEM)}
    )
    shutil.copy(next(site.glob(f"nvidia/**/{KEPT}")), folder / KEPT)
    for name in REMOVED_LIBRARIES:
        (folder / name).unlink()
    for name in sorted(replaced):
        os.symlink(STUB, folder / name)
    for pattern in REMOVED_PACKAGES:
        _remove(site.glob(pattern))
    for pattern in REMOVED_OF_TORCH:
        _remove((site / "torch").glob(pattern))


def _needed(library: Path) -> Iterator[str]:
    for line in _readelf("--dynamic", library):
        if "(NEEDED)" in line:
            yield line.partition("[")[2].rstrip("]")


def _symbols(library: Path, *, defined: bool) -> Iterator[tuple[str, str]]:
    """List the global symbols that a library defines, or wants of others, with their versions."""
    for line in _readelf("--dyn-syms", library):
        columns = line.split()
        if len(columns) >= 8 and columns[4] in ("GLOBAL", "WEAK") and (columns[6] != "UND") == defined:
            name, _, version = columns[7].partition("@")
            yield name, version.lstrip("@")


def _readelf(what: str, library: Path) -> list[str]:
    command = ["readelf", "--wide", what, str(library)]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.splitlines()


def _build_stub(folder: Path, symbols: dict[str, str]) -> None:
    """Functions that do nothing, and the C++ types that torch registers when it is imported.

    C functions answer 1, which all of CUDA's libraries call an error; C++ ones the address of
    zeroes, for torch stores through a reference that one of them returns.
    """
    code = ["failed: movl $1, %eax", "ret", "zeroes: leaq space(%rip), %rax", "ret"]
    data = [".local space", ".comm space, 4096, 64"]
    for name in symbols:
        if name.startswith("_ZTI"):
            data += [f".globl {name}", f"{name}: .quad _ZTVN10__cxxabiv117__class_type_infoE+16, 1f"]
            data += [f'1: .asciz "{name.removeprefix("_ZTI")}"', ".balign 8"]
        elif name.startswith("_ZTV"):
            data += [f".globl {name}", f"{name}: .fill 512, 8, 0"]
        else:
            target = "zeroes" if name.startswith("_Z") else "failed"
            code += [f".globl {name}", f".type {name}, @function", f".set {name}, {target}"]
    source, versions = folder / "stub.s", folder / "stub.map"
    source.write_text(
        "\n".join([".text", *code, ".data", *data, '.section .note.GNU-stack,"",@progbits', ""])
    )
    tags = sorted({version for version in symbols.values() if version})
    nodes = {tag: [name for name, version in symbols.items() if version == tag] for tag in tags}
    versions.write_text("".join(f"{tag} {{ {'; '.join(names)}; }};\n" for tag, names in nodes.items()))
    command = ["cc", "-shared", "-o", str(folder / STUB), str(source), "-l:libstdc++.so.6"]
    subprocess.run([*command, f"-Wl,--version-script={versions}"], check=True)
    source.unlink()
    versions.unlink()


def _remove(paths: Iterable[Path]) -> None:
    for path in paths:
        shutil.rmtree(path) if path.is_dir() else path.unlink()


if __name__ == "__main__":
    main()
