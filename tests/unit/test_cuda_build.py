"""What the build does with the nvcc that it finds, or does not."""

import os
import subprocess
import sys
from pathlib import Path

import nanobind
import pytest

ROOT = Path(__file__).parents[2]
BIN = Path(sys.executable).parent


def configure(build: Path, *options: str, **env: str) -> tuple[int, str]:
    command = [str(BIN / "cmake"), "-S", str(ROOT), "-B", str(build), "-G", "Ninja", *options]
    command += [f"-DCMAKE_MAKE_PROGRAM={BIN / 'ninja'}", f"-DPython_EXECUTABLE={sys.executable}"]
    command += [f"-Dnanobind_DIR={nanobind.cmake_dir()}"]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, **env}, check=False)
    return done.returncode, done.stdout + done.stderr


def test_an_nvcc_that_is_gone_is_looked_for_anew(tmp_path: Path) -> None:
    """A build folder outlives the environment whose wheels had it."""
    status, said = configure(tmp_path, "-DDISAGG_NVCC=/gone/bin/nvcc")
    assert status == 0, said
    assert "/gone" not in said


@pytest.mark.parametrize(("wanted", "works"), [("AUTO", True), ("ON", False)])
def test_an_old_nvcc_is_left_alone_or_refused(tmp_path: Path, wanted: str, works: bool) -> None:
    nvcc = tmp_path / "cuda" / "bin" / "nvcc"
    nvcc.parent.mkdir(parents=True)
    nvcc.write_text("#!/bin/sh\necho 'Cuda compilation tools, release 11.8, V11.8.89'\n")
    nvcc.chmod(0o755)
    status, said = configure(tmp_path, f"-DDISAGG_CUDA={wanted}", CUDA_HOME=str(tmp_path / "cuda"))
    assert (status == 0) is works, said
    assert "is of CUDA 11.8, older than 12.5" in said
