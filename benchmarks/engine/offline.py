"""Claim: one Hopper GPU serves the common offline benchmark faster than mini-sglang does.

The workload of mini-sglang's and nano-vLLM's benchmarks: seed 0, 256 requests, prompts of 100 to
1024 random ids below 10,000, outputs of 100 to 1024, temperature 0.6, end tokens ignored. Weights
are random. Each round draws other prompts of the same lengths, so that the prefix cache has none.
The reference's figures are quoted, not measured here.

    python benchmarks/engine/offline.py SHAPE_DIR [--rounds 3] [--layers N] [--kv-cache-dtype fp8] [--profile]
"""

import argparse
import json
import statistics
import tempfile
import time
from pathlib import Path
from random import Random
from typing import Any

import torch

from disagg.llm import LLM
from disagg.offline_bench import Work
from disagg.protocol import SamplingParams

REFERENCE = {  # output tokens a second of mini-sglang's best setting
    ("qwen3-0.6b", "H200"): 22_100,
    ("qwen3-0.6b", "H100"): 18_200,
    ("llama-3.1-8b", "H200"): 9_600,
    ("llama-3.1-8b", "H100"): 8_100,
}
NUM_REQUESTS = 256
RESULTS = Path(__file__).parent.parent / "results"


def make_work(salt: int) -> Work:
    """The requests; `salt` changes their first token and no length."""
    draw = Random(0)
    prompts = [[draw.randint(0, 10_000) for _ in range(draw.randint(100, 1024))] for _ in range(NUM_REQUESTS)]
    lengths = [draw.randint(100, 1024) for _ in range(NUM_REQUESTS)]
    for prompt in prompts:
        prompt[0] = (prompt[0] + salt) % 10_000
    return [
        (p, SamplingParams(max_tokens=n, temperature=0.6, ignore_eos=True, seed=0, choice_index=i))
        for i, (p, n) in enumerate(zip(prompts, lengths, strict=True))
    ]


def with_layers(shape: Path, num_layers: int, folder: Path) -> Path:
    """The same shape with another number of layers, in `folder`."""
    config = json.loads((shape / "config.json").read_text())
    made = folder / f"{shape.name}-{num_layers}-layers"
    made.mkdir()
    (made / "config.json").write_text(json.dumps({**config, "num_hidden_layers": num_layers}))
    return made


def measure(llm: LLM, work: Work) -> dict[str, float]:
    began = time.perf_counter()
    first = num_tokens = 0.0
    for progress in llm.run(work):
        first = first or time.perf_counter() - began
        num_tokens += len(progress.token_ids)
    seconds = time.perf_counter() - began
    return {"seconds": seconds, "tokens": num_tokens, "first_token_s": first}


class Timeline:
    """What the device did in each step, by events around what the runner launches."""

    def __init__(self, runner: Any) -> None:
        self._launch, self._stream = runner.launch, runner._stream
        self.steps: list[tuple[int, int, Any, Any]] = []
        runner.launch = self.launch

    def launch(self, plan: Any) -> Any:
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record(self._stream)
        sampled = self._launch(plan)
        end.record(self._stream)
        self.steps.append((plan.num_rows - plan.num_decodes, plan.num_decodes, begin, end))
        return sampled

    def report(self) -> str:
        torch.cuda.synchronize()
        spans = [(chunks, decodes, a.elapsed_time(b)) for chunks, decodes, a, b in self.steps]
        gaps = sorted(a[3].elapsed_time(b[2]) for a, b in zip(self.steps, self.steps[1:], strict=False))
        lines = [f"{len(spans)} steps; with chunks {sum(ms for c, _, ms in spans if c):.0f} ms"]
        for low, high in ((1, 16), (17, 64), (65, 128), (129, 192), (193, 256)):
            times = [ms for c, n, ms in spans if not c and low <= n <= high]
            if times:
                mean = statistics.mean(times)
                lines.append(f"{low:4}..{high:<4} {len(times):5} steps {sum(times):8.0f} ms, {mean:.3f} each")
        marks = (f"p{q} {gaps[min(len(gaps) - 1, len(gaps) * q // 100)] * 1e3:.0f}" for q in (1, 50, 90, 99))
        lines.append(f"between steps the device waits, us: {', '.join(marks)}; {sum(gaps):.0f} ms in all")
        return "\n".join(lines)


def profile(llm: LLM, work: Work, steps: int = 30) -> str:
    """Where the device's time goes in the middle of the run."""
    run = llm.run(work)
    for i, _ in enumerate(run):
        if i == NUM_REQUESTS * 60:
            break
    kinds = [torch.profiler.ProfilerActivity.CUDA, torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=kinds) as trace:
        for i, _ in enumerate(run):
            if i == NUM_REQUESTS * steps:
                break
        torch.cuda.synchronize()
    run.close()
    return trace.key_averages().table(sort_by="self_cuda_time_total", row_limit=30, max_name_column_width=90)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("shape", type=Path, help="Folder with a config.json.")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--max-num-batched-tokens", type=int, default=16_384)
    parser.add_argument("--attention-backend", default="auto")
    parser.add_argument("--kv-cache-dtype", default="auto", choices=["auto", "fp8"])
    parser.add_argument("--quantization", choices=["fp8"])
    parser.add_argument("--layers", type=int, help="Take so many of the shape's, for want of memory or time.")
    parser.add_argument("--timeline", action="store_true", help="Also say where a round's time goes.")
    parser.add_argument(
        "--profile", action="store_true", help="Print where the time goes, and measure nothing."
    )
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        if arguments.layers is not None:
            arguments.shape = with_layers(arguments.shape, arguments.layers, Path(folder))
        run(arguments)


def run(arguments: argparse.Namespace) -> None:
    began = time.perf_counter()
    llm = LLM(
        str(arguments.shape),
        load_format="dummy",
        dtype="bfloat16",
        max_num_seqs=NUM_REQUESTS,
        max_num_batched_tokens=arguments.max_num_batched_tokens,
        max_model_len=2048,
        attention_backend=arguments.attention_backend,
        kv_cache_dtype=arguments.kv_cache_dtype,
        quantization=arguments.quantization,
    )
    loaded_s = time.perf_counter() - began
    first = measure(llm, [(p, SamplingParams(max_tokens=4, ignore_eos=True)) for p, _ in make_work(9_999)])
    print(f"loaded in {loaded_s:.1f} s, first token {first['first_token_s']:.1f} s later", flush=True)
    if arguments.profile:
        print(profile(llm, make_work(77)))
        return
    rounds = [measure(llm, make_work(salt)) for salt in range(arguments.rounds)]
    if arguments.timeline:
        timeline = Timeline(llm.engine._runner)
        print(measure(llm, make_work(50)), timeline.report(), sep="\n", flush=True)
    speeds = [r["tokens"] / r["seconds"] for r in rounds]
    card = torch.cuda.get_device_name().removeprefix("NVIDIA ").split()[0]
    result: dict[str, Any] = {
        "claim": "offline throughput",
        "shape": arguments.shape.name,
        "card": torch.cuda.get_device_name(),
        "output_tokens_per_s": round(statistics.median(speeds), 1),
        "rounds": [round(speed, 1) for speed in speeds],
        "mini_sglang_quoted": REFERENCE.get((arguments.shape.name, card)),
        "attention_backend": arguments.attention_backend,
        "kv_cache_dtype": arguments.kv_cache_dtype,
        "quantization": arguments.quantization,
        "load_s": round(loaded_s, 1),
        "torch": torch.__version__,
    }
    print(json.dumps(result), flush=True)
    RESULTS.mkdir(exist_ok=True)
    options = (
        arguments.quantization,
        "" if arguments.kv_cache_dtype == "auto" else f"kv-{arguments.kv_cache_dtype}",
    )
    name = "-".join(filter(None, ("offline", arguments.shape.name, *options, card)))
    (RESULTS / f"{name}.json").write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
