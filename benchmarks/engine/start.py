"""Claim: from the start of a process to its first token in under 30 s; mini-sglang compiles for 130 to 150 s.

    python benchmarks/engine/start.py SHAPE_DIR [--dummy-only]

A new process loads random weights, then another one the same shape from safetensors, which this one writes
and the page cache holds. Each tells when its stages ended: imports, the CUDA context, weights, then the KV
pool with attention's kernels and the first step, the graphs, and the first token of a prompt of 512. What
is compiled meanwhile is listed; where the kernels were compiled ahead it is nothing.
"""

import argparse
import json
import logging
import subprocess
import sys
import tempfile
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

from disagg.telemetry.stages import Stages

LIMIT_S = 30.0
REFERENCE_S = (130, 150)
"""mini-sglang's compilation before its first token, quoted."""
RESULTS = Path(__file__).parent.parent / "results"


class Marks(logging.Handler):
    """Ends a stage where the engine's log says so, and keeps what it says of compilation."""

    def __init__(self, stages: Stages) -> None:
        super().__init__()
        self.compiled: list[str] = []
        self._stages = stages

    def emit(self, record: logging.LogRecord) -> None:
        text = record.getMessage()
        if text.startswith("first step run"):
            self._stages.end("pool_and_first_step")
        elif text.startswith("decode graphs captured"):
            self._stages.end("graphs")
        elif "compile" in text:
            self.compiled.append(text)


def child(folder: str, load_format: str, began_at: float) -> None:
    """The process that is measured; prints one line of JSON."""
    stages = Stages(age_s=lambda: time.monotonic() - began_at)
    stages.end("process")
    import torch

    from disagg.llm import LLM
    from disagg.protocol import SamplingParams

    stages.end("imports")
    torch.zeros(1, device="cuda")
    stages.end("context")
    marks = Marks(stages)
    logging.getLogger("disagg").addHandler(marks)
    logging.getLogger("disagg").setLevel(logging.INFO)

    def progress(done: int, total: int) -> None:
        if done == total:
            torch.cuda.synchronize()
            stages.end("weights")

    llm = LLM(folder, load_format=load_format, dtype="bfloat16", max_model_len=2048, progress=progress)
    stages.end("rest")
    sampling = SamplingParams(max_tokens=8, ignore_eos=True)
    for _ in llm.run([(list(range(100, 612)), sampling)]):
        stages.end("first_token")
        break
    print(json.dumps({**stages.fields(), "compiled": marks.compiled, "card": torch.cuda.get_device_name()}))


def measure(folder: Path, load_format: str) -> dict[str, Any]:
    command = [sys.executable, __file__, "--child", load_format, str(time.monotonic()), str(folder)]
    ran = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    result: dict[str, Any] = json.loads(ran.stdout.splitlines()[-1])
    return result


def write_weights(shape: Path, folder: Path) -> None:
    """A checkpoint of noise: one megabyte over and over, which is as fast to read as any."""
    from disagg.checkpoint.tensors import SINGLE_NAME, TensorSpec, TensorWriter
    from disagg.models import load_spec
    from disagg.models.load import whole_shapes

    for name in ("config.json", "tokenizer.json", "tokenizer_config.json"):
        source = shape / name
        (folder / name).write_bytes(source.read_bytes() if source.exists() else b"{}")
    specs = [TensorSpec(name, "BF16", size) for name, size in whole_shapes(load_spec(shape)).items()]
    writer = TensorWriter(folder / SINGLE_NAME, specs)
    small = np.random.default_rng(0).normal(0, 0.02, 1 << 20).astype(np.float32)
    block = memoryview((small.view(np.uint32) >> 16).astype(np.uint16)).cast("B")
    for spec in specs:
        for begin in range(0, spec.num_bytes, len(block)):
            writer.write(block[: spec.num_bytes - begin])
    writer.close()


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("shape", type=Path, help="Folder with a config.json.")
    parser.add_argument("--dummy-only", action="store_true", help="Write no checkpoint.")
    parser.add_argument("--child", nargs=2, metavar=("LOAD_FORMAT", "BEGAN_AT"), help=argparse.SUPPRESS)
    a = parser.parse_args()
    if a.child:
        child(str(a.shape), a.child[0], float(a.child[1]))
        return
    runs = {"dummy": measure(a.shape, "dummy")}
    print(json.dumps(runs), flush=True)
    if not a.dummy_only:
        with tempfile.TemporaryDirectory() as folder:
            write_weights(a.shape, Path(folder))
            runs["safetensors"] = measure(Path(folder), "auto")
    card = runs["dummy"]["card"]
    worst = max(run["start_s"] for run in runs.values())
    result = {
        "claim": f"process start to first token under {LIMIT_S:.0f} s",
        "shape": a.shape.name,
        "card": card,
        "holds": worst < LIMIT_S,
        "mini_sglang_compiles_quoted_s": REFERENCE_S,
        "runs": runs,
        "torch": version("torch"),
        "flashinfer": version("flashinfer-python"),
    }
    print(json.dumps(result), flush=True)
    RESULTS.mkdir(exist_ok=True)
    name = f"start-{a.shape.name}-{card.removeprefix('NVIDIA ').split()[0]}.json"
    (RESULTS / name).write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
