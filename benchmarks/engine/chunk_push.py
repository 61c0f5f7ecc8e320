"""Claim: a chunk of a long prompt is pushed while the next one computes, so only the last push is waited for.

A prefill engine and its transfer thread in this process, a decode rank's pool in another, both on one
GPU; the engine's own steps and the mover's own pushes, in each transport. The timeline is kept in
benchmarks/results/: of each chunk when it was computed, by the device's events, and when it was
pushed, from its post to the transport's word that it has landed.

    python benchmarks/engine/chunk_push.py SHAPE_DIR [--prompt-tokens 32768] [--chunk 4096]
    python benchmarks/engine/chunk_push.py --draw RESULT.json > docs/chunk_push.svg
"""

import argparse
import itertools
import json
import queue
import statistics
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent.parent
sys.path.insert(0, str(ROOT / "tests"))
RESULTS = ROOT / "benchmarks" / "results"
TRANSPORTS = ("none", "cuda_ipc", "nixl")
ROUNDS = 3
_NUMBERS = itertools.count()
Span = dict[str, float]


class Recorded:
    """A transport that notes when each write was posted and when it ended."""

    def __init__(self, transport: Any) -> None:
        self._transport = transport
        self.spans: dict[int, Span] = {}

    def __getattr__(self, name: str) -> Any:
        return getattr(self._transport, name)

    def post(self, write: Any) -> Any:
        began = time.monotonic()
        write_id = self._transport.post(write)
        self.spans[write_id] = {"begin": began, "bytes": write.runs.num_bytes, "end": 0.0}
        return write_id

    def poll(self) -> Any:
        events = self._transport.poll()
        for event in events:
            if hasattr(event, "write_id"):
                self.spans[event.write_id]["end"] = time.monotonic()
        return events


class Steps:
    """When the device computed each step, on the host's clock."""

    def __init__(self, runner: Any) -> None:
        import torch

        self._torch = torch
        self._launch, self._stream = runner.launch, runner._stream
        self._anchor = torch.cuda.Event(enable_timing=True)
        self._events: list[tuple[Any, Any]] = []
        runner.launch = self.launch

    def begin(self) -> None:
        self._events.clear()
        self._torch.cuda.synchronize()
        self._anchor.record(self._stream)
        self._anchor.synchronize()
        self._at = time.monotonic()

    def launch(self, plan: Any) -> Any:
        begin, end = (self._torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record(self._stream)
        sampled = self._launch(plan)
        end.record(self._stream)
        self._events.append((begin, end))
        return sampled

    def spans(self) -> list[Span]:
        self._torch.cuda.synchronize()
        since = [[self._anchor.elapsed_time(event) / 1e3 for event in pair] for pair in self._events]
        return [{"begin": self._at + begin, "end": self._at + end} for begin, end in since]


@contextmanager
def pushing(rank: Any, transport: str, target: Any) -> Iterator[tuple[Any, Recorded, "queue.Queue[Any]"]]:
    """Run a transfer thread over the engine's pool, connected to the target's."""
    from disagg.transfer import AwaitKv, Connect, Connected, PoolMemory, TransferThread, make_transport
    from support.kv_ranks import hello_of

    made: list[Recorded] = []
    events: queue.Queue[Any] = queue.Queue()

    def make() -> Any:
        pool = PoolMemory.of_tensor(rank.pool)
        made.append(Recorded(make_transport(transport, uuid=f"p-{transport}", rank=0, pool=pool)))
        return made[0]

    thread = TransferThread(make, rank.layout, 0, events.put, lambda error: events.put(error))
    thread.start()
    try:
        thread.submit(Connect(hello_of("decode-0", "d", rank.layout, [target])))
        assert isinstance(events.get(timeout=30), Connected)
        target.submit(AwaitKv(+1))
        yield thread, made[0], events
        target.submit(AwaitKv(-1))
    finally:
        thread.stop()


def prefill(engine: Any, number: int, prompt: list[int], pushed: Any) -> tuple[float, float, float]:
    """Compute a prompt and push its chunks; instants of the beginning, the first token and the last event."""
    from disagg.engine import EngineRequest
    from disagg.protocol import SamplingParams
    from disagg.transfer import FinishPush, PushChunk, PushComplete

    name, num_taken, first_at = f"r{number}", 0, 0.0
    key = (name, 0)
    request = EngineRequest(
        request_id=name,
        token_ids=prompt,
        num_prompt_tokens=len(prompt),
        sampling=SamplingParams(max_tokens=4, ignore_eos=True),
        prefill_only=True,
    )
    began = time.monotonic()
    engine.add(request)
    while not first_at:
        output = engine.step()
        for event in output.events if output else []:
            if not hasattr(event, "is_last"):
                continue
            if pushed:
                pages = event.page_ids[num_taken:]
                pushed[0].submit(
                    PushChunk(key, "d", pages, range(num_taken, len(event.page_ids)), began + 60)
                )
                num_taken = len(event.page_ids)
            if event.is_last:
                first_at = time.monotonic()
                if pushed:
                    pushed[0].submit(FinishPush(key, token_id=0, position=0, finished=False))
    if pushed:
        assert isinstance(pushed[2].get(timeout=60), PushComplete)
    ended = time.monotonic()
    engine.release(name)
    return began, first_at, ended


def measure(arguments: argparse.Namespace) -> dict[str, Any]:
    import torch

    from disagg.config import EngineConfig, ModelConfig
    from disagg.engine.build import load_rank, make_engine
    from disagg.transfer import prepare_environment
    from support.kv_ranks import DEVICE, TRANSPORT, Rank

    prepare_environment()
    num_pages = arguments.prompt_tokens // 16 + 64
    model = ModelConfig(
        model=str(arguments.shape),
        load_format="dummy",
        dtype=arguments.dtype,
        max_model_len=arguments.prompt_tokens + 16,
    )
    config = EngineConfig(
        max_num_seqs=4,
        max_num_batched_tokens=arguments.chunk,
        kv_cache_memory_bytes=arguments.pool_bytes,
        prefix_cache="none",
    )
    rank = load_rank(model, config)
    engine, steps = make_engine(rank, config), Steps(rank.runner)
    target = Rank("d", 0, rank.layout, num_pages, environ={DEVICE: "cuda", TRANSPORT: "auto"})
    prompt = [(7 * i) % 10_000 for i in range(arguments.prompt_tokens)]
    runs: dict[str, Any] = {}
    try:
        prefill(engine, next(_NUMBERS), prompt, None)
        for transport in TRANSPORTS:
            if transport == "none":
                runs[transport] = best(engine, steps, prompt, None)
                continue
            with pushing(rank, transport, target) as pushed:
                runs[transport] = best(engine, steps, prompt, pushed)
    finally:
        target.stop()
    return {
        "claim": "the push of a chunk overlaps the next chunk's compute",
        "shape": arguments.shape.name,
        "card": torch.cuda.get_device_name(),
        "prompt_tokens": arguments.prompt_tokens,
        "chunk_tokens": arguments.chunk,
        "transports": runs,
        "torch": torch.__version__,
    }


def best(engine: Any, steps: Steps, prompt: list[int], pushed: Any) -> dict[str, Any]:
    """The run of several whose first token came at the median time, the first left out as a warm-up."""
    runs = []
    for _ in range(ROUNDS + 1):
        steps.begin()
        if pushed:
            pushed[1].spans.clear()
        began, first_at, ended = prefill(engine, next(_NUMBERS), prompt, pushed)
        pushes = list(pushed[1].spans.values()) if pushed else []
        runs.append(summary(began, first_at, ended, steps.spans(), pushes))
    return sorted(runs[1:], key=lambda run: run["first_token_ms"])[ROUNDS // 2]


def summary(
    began: float, first_at: float, ended: float, steps: list[Span], pushes: list[Span]
) -> dict[str, Any]:
    """All times in milliseconds from the beginning."""

    def ms(at: float) -> float:
        return round((at - began) * 1e3, 3)

    def hidden(push: Span) -> float:
        return sum(max(0.0, min(push["end"], s["end"]) - max(push["begin"], s["begin"])) for s in steps)

    push_s = sum(push["end"] - push["begin"] for push in pushes)
    return {
        "first_token_ms": ms(first_at),
        "last_push_after_first_token_ms": round((ended - first_at) * 1e3, 3),
        "compute": [[ms(span["begin"]), ms(span["end"])] for span in steps],
        "push": [[ms(span["begin"]), ms(span["end"])] for span in pushes],
        "push_bytes": [int(span["bytes"]) for span in pushes],
        "push_gigabytes_per_s": round(
            statistics.median(span["bytes"] / (span["end"] - span["begin"]) / 1e9 for span in pushes), 1
        )
        if pushes
        else None,
        "push_share_under_compute": round(sum(map(hidden, pushes)) / push_s, 3) if pushes else None,
    }


def draw(result: dict[str, Any]) -> str:
    """The timelines as SVG: what is computed above, what is pushed below it."""
    runs = {name: run for name, run in result["transports"].items() if run["push"]}
    end = max(span[1] for run in runs.values() for span in run["compute"] + run["push"])
    width, left, row = 900, 90, 22
    height = 40 + 70 * len(runs)

    scale = (width - left - 10) / end

    def bars(spans: list[list[float]], y: int, colour: str) -> Iterator[str]:
        for begin, until in spans:
            x, w = left + begin * scale, max(1.5, (until - begin) * scale)
            place = f'x="{x:.1f}" y="{y}" width="{w:.1f}" height="{row - 4}"'
            yield f'<rect {place} fill="{colour}" stroke="#fff"/>'

    lines = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" font-family="sans-serif" '
        'font-size="12">',
        f'<rect width="{width}" height="{height}" fill="#fff"/>',
        f'<text x="{left}" y="18">{result["prompt_tokens"]} tokens in chunks of {result["chunk_tokens"]}, '
        f"{result['shape']}, {result['card']}: {end:.0f} ms</text>",
    ]
    for i, (name, run) in enumerate(runs.items()):
        y = 30 + 70 * i
        lines += [f'<text x="4" y="{y + 14}">compute</text>', *bars(run["compute"], y, "#4878a8")]
        lines += [f'<text x="4" y="{y + row + 14}">{name}</text>', *bars(run["push"], y + row, "#d07030")]
    return "\n".join([*lines, "</svg>"])


def main() -> None:
    ask = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    ask.add_argument("shape", type=Path, nargs="?", help="Folder with a config.json.")
    ask.add_argument("--prompt-tokens", type=int, default=32_768)
    ask.add_argument("--chunk", type=int, default=4_096)
    ask.add_argument("--pool-bytes", type=int, default=8 << 30)
    ask.add_argument("--dtype", default="bfloat16")
    ask.add_argument("--draw", type=Path, metavar="RESULT", help="Only draw what was measured.")
    arguments = ask.parse_args()
    if arguments.draw:
        print(draw(json.loads(arguments.draw.read_text())))
        return
    result = measure(arguments)
    card = result["card"].removeprefix("NVIDIA ").split()[0]
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / f"chunk_push-{card}.json").write_text(json.dumps(result, indent=1) + "\n")
    for name, run in result["transports"].items():
        print(name, json.dumps(run), flush=True)


if __name__ == "__main__":
    main()
