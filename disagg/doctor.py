"""Whether this machine can serve, and how well: each check returns one finding.

Checks import what they look at inside themselves, for a missing package is a finding.
"""

import importlib
import importlib.metadata
import importlib.util
import os
import platform
import resource
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from msgspec import Struct

from disagg.errors import ConfigError, DisaggError

if TYPE_CHECKING:
    from disagg.transfer import ProbeResult

Status = Literal["ok", "note", "missing"]

PACKAGES = ("torch", "nixl", "pyzmq", "tokenizers", "safetensors", "gguf", "fastapi", "uvicorn", "msgspec")


class Finding(Struct, frozen=True):
    """One line of the report. `missing` means that serving cannot work; `advice` says what to do."""

    subject: str
    status: Status
    detail: str
    advice: str = ""


def examine(model: str, host: str, port: int) -> Iterator[Finding]:
    """Run every check in turn; a check that raises is a finding too."""
    checks: list[tuple[str, Callable[[], Finding | None]]] = [
        ("python", check_python),
        ("packages", check_packages),
        ("extension", check_extension),
        ("cpu", check_cpu),
        ("memory", check_memory),
        ("gpu", check_gpu),
        ("attention", check_attention),
        ("kv transport", check_transport),
        ("kv on gpu", check_gpu_transport),
        ("shared memory", check_shared_memory),
        ("descriptors", check_descriptors),
        ("port", lambda: check_port(host, port)),
        ("model", lambda: check_model(model)),
    ]
    for subject, check in checks:
        try:
            if (finding := check()) is not None:
                yield finding
        except Exception as error:  # what breaks a check may break serving, whatever it is
            detail = f"{type(error).__name__}: {error}"
            yield Finding(subject, "missing", detail, f"The {subject} could not be examined.")


def can_serve(findings: list[Finding]) -> bool:
    """Whether nothing that serving needs is missing."""
    return all(finding.status != "missing" for finding in findings)


def check_python() -> Finding:
    """Name the interpreter and the kernel."""
    return Finding("python", "ok", f"{platform.python_version()} on {platform.system()} {platform.release()}")


def check_packages() -> Finding:
    """Look at the versions of what serving needs."""
    found, absent = [], []
    for name in PACKAGES:
        try:
            found.append(f"{name} {importlib.metadata.version(name)}")
        except importlib.metadata.PackageNotFoundError:
            absent.append(name)
    if absent:
        advice = f"Install {', '.join(absent)}: the package was installed without its dependencies."
        return Finding("packages", "missing", ", ".join(found), advice)
    return Finding("packages", "ok", ", ".join(found))


def check_extension() -> Finding:
    """Load the compiled parts."""
    for name in ("disagg._core", "disagg._cpu"):
        try:
            importlib.import_module(name)
        except ImportError as error:
            advice = "Build it with a C++20 compiler: pip install . in the source tree."
            return Finding("extension", "missing", str(error), advice)
    return Finding("extension", "ok", "page hashes, radix tree, prefix index and CPU kernels load")


def check_cpu() -> Finding:
    """Name cores and the instructions that the CPU kernels will use."""
    flags = _cpu_flags()
    useful = [flag for flag in ("avx2", "fma", "avx512f", "avx512_bf16", "amx_bf16") if flag in flags]
    cores = len(os.sched_getaffinity(0))
    detail = f"{cores} cores, {' '.join(useful) or 'no vector extensions that the kernels use'}"
    if "avx512_bf16" not in flags:
        return Finding("cpu", "note", detail, "Without avx512_bf16, bfloat16 on this CPU is slow.")
    return Finding("cpu", "ok", detail)


def check_memory() -> Finding:
    """Look at the memory that this process may use, cgroup limits included."""
    available = _available_bytes()
    detail = f"{available / 2**30:.1f} GiB available"
    if available < 3 * 2**30:
        advice = "The default system takes about 3 GiB; lower --kv-cache-memory-bytes."
        return Finding("memory", "note", detail, advice)
    return Finding("memory", "ok", detail)


def check_gpu() -> Finding:
    """List the GPUs that torch can use."""
    import torch

    if not torch.cuda.is_available():
        return Finding("gpu", "note", "none that torch can use", "Serving runs on the CPU.")
    names = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return Finding("gpu", "ok", f"{', '.join(names)}; CUDA {torch.version.cuda}")


def check_attention() -> Finding:
    """List the attention backends that can be asked for here."""
    import torch

    usable = ["cpu", *(["fi"] if importlib.util.find_spec("flashinfer") else [])]
    if torch.cuda.is_available() and usable == ["cpu"]:
        advice = "Install disagg[cuda] for FlashInfer: there is a GPU and no attention kernel for it."
        return Finding("attention", "missing", "cpu only", advice)
    return Finding("attention", "ok", ", ".join(usable))


def check_transport() -> Finding:
    """Push KV pages between two processes and time it."""
    from disagg.transfer import probe_transport

    probe = probe_transport()
    detail = f"{probe.transport}: {probe.gigabytes_per_s:.1f} GB/s between two processes"
    return Finding("kv transport", "ok", detail)


def check_gpu_transport() -> Finding | None:
    """Push KV pages between two processes on the first GPU, by either way; None without a GPU."""
    import torch

    if not torch.cuda.is_available():
        return None
    return judge_gpu_transport(_probe_gpu("cuda_ipc"), _probe_gpu("nixl"))


def judge_gpu_transport(ipc: "ProbeResult | DisaggError", nixl: "ProbeResult | DisaggError") -> Finding:
    """Say what was measured, and why where it is not what it should be."""
    from disagg.transfer import SLOW_BYTES_PER_S, LinkFacts, host_id, why_slow

    told, advice = [], []
    for name, probe in (("cuda_ipc", ipc), ("nixl", nixl)):
        if isinstance(probe, DisaggError):
            told.append(f"{name}: none")
            advice.append(f"No KV by {name}: {probe}.")
        else:
            told.append(f"{probe.transport}: {probe.gigabytes_per_s:.1f} GB/s")
    if not isinstance(nixl, DisaggError) and nixl.gigabytes_per_s * 1e9 < SLOW_BYTES_PER_S:
        here = host_id()
        advice.append(f"UCX has fallen back to a slow way: {why_slow(LinkFacts.of(here, here))}.")
    detail = f"{'; '.join(told)} between two processes on one GPU"
    return Finding("kv on gpu", "note" if advice else "ok", detail, " ".join(advice))


def _probe_gpu(name: str) -> "ProbeResult | DisaggError":
    from disagg.transfer import probe_transport

    try:
        return probe_transport(name, device="cuda")
    except DisaggError as error:
        return error


def check_shared_memory() -> Finding:
    """Look at /dev/shm, by which processes of one host exchange pages."""
    free = shutil.disk_usage("/dev/shm").free
    detail = f"/dev/shm has {free / 2**20:.0f} MiB free"
    if free < 64 * 2**20:
        return Finding("shared memory", "note", detail, "KV moves over TCP on this host: enlarge /dev/shm.")
    return Finding("shared memory", "ok", detail)


def check_descriptors() -> Finding:
    """Look at the limit of open files: a stream takes one."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    detail = f"at most {soft} open files (hard limit {hard})"
    if soft < 4096:
        return Finding("descriptors", "note", detail, "Raise it with ulimit -n: each open stream takes one.")
    return Finding("descriptors", "ok", detail)


def check_port(host: str, port: int) -> Finding:
    """Try to bind the router's port."""
    from disagg.security import host_port, listen

    address = host_port(host, port)
    try:
        listen(host, port, 1).close()
    except OSError as error:
        advice = "Choose another with --port, or stop what listens there."
        return Finding("port", "missing", f"{address} cannot be bound: {error.strerror}", advice)
    return Finding("port", "ok", f"{address} is free")


def check_model(model: str) -> Finding:
    """Find the model's files."""
    from disagg.checkpoint import resolve

    try:
        files = resolve(model)
    except ConfigError as error:
        return Finding("model", "missing", str(error), "Name a directory, a .gguf file or a reachable id.")
    size = sum(file.stat().st_size for file in Path(files.path).iterdir() if file.is_file())
    return Finding("model", "ok", f"{files.name}: {files.path}, {size / 2**20:.0f} MiB")


def _cpu_flags() -> set[str]:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("flags"):
            return set(line.split(":", 1)[1].split())
    return set()


def _available_bytes() -> int:
    available = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    for line in Path("/proc/meminfo").read_text().splitlines():
        if line.startswith("MemAvailable"):
            available = int(line.split()[1]) * 1024
    limit = Path("/sys/fs/cgroup/memory.max")
    if limit.exists() and (text := limit.read_text().strip()) != "max":
        available = min(available, int(text))
    return available
