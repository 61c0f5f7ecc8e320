"""Two ranks on GPUs: the tokens of one rank, from graphs that hold the sums between them.

On one GPU it takes NCCL 2.31: `LD_PRELOAD=…/libnccl.so.2 NCCL_MULTI_RANK_GPU_ENABLE=1`.
"""

import multiprocessing
import os
import time
from collections.abc import Iterator
from contextlib import suppress
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import pytest
import torch
from torch._C import _distributed_c10d as c10d

from disagg.config import EngineConfig, ModelConfig
from disagg.engine import EngineRequest, StepPlan, StepRetired
from disagg.engine.build import Rank, load_rank, make_engine, pick_device
from disagg.errors import WorkerLost
from disagg.llm import LLM
from disagg.parallel import TensorParallel
from disagg.protocol import SamplingParams, decoder
from support.checkpoints import make_checkpoint
from support.gpu import needs_nccl
from support.system import eventually, running

SIZE = 2
POOL_BYTES = 64 << 20
LIMIT_S = 60.0
PROMPTS = [[3 + (7 * i + j * j) % 317 for j in range(n)] for i, n in enumerate((1, 17, 40, 130, 64, 3))]
SAMPLING = [
    SamplingParams(
        max_tokens=30,
        temperature=(0.0, 0.8)[i % 2],
        top_k=(0, 20)[i // 2 % 2],
        top_p=(1.0, 0.9)[i // 3 % 2],
        seed=i * 0x9E3779B97F4A7C15 % 2**64,
        ignore_eos=True,
    )
    for i in range(len(PROMPTS))
]
_SPAWN = multiprocessing.get_context("spawn")

pytestmark = needs_nccl(SIZE)


def configs(folder: Path) -> tuple[ModelConfig, EngineConfig]:
    engine = EngineConfig(
        tensor_parallel_size=SIZE,
        kv_cache_memory_bytes=POOL_BYTES,
        max_num_seqs=8,
        max_num_batched_tokens=64,
        attention_backend="reference,cuda",
    )
    return ModelConfig(model=str(folder), dtype="float32", device="cuda"), engine


def join(folder: Path, number: int, timeout_s: float) -> Rank:
    model, engine = configs(folder)
    store = c10d.FileStore(str(folder / "store"), SIZE)
    device = pick_device("cuda", number, SIZE)
    tp = TensorParallel.join(store, number, SIZE, device=device, timeout_s=timeout_s)
    return load_rank(model, engine, tp=tp, device=device)


LONG = SamplingParams(max_tokens=800, temperature=0, ignore_eos=True)


def be_rank(pipe: Connection, to_follower: Connection, folder: Path, number: int, timeout_s: float) -> None:
    torch.backends.cuda.matmul.allow_tf32 = False
    runner: Any
    rank = join(folder, number, timeout_s)
    runner = rank.runner
    pipe.send((type(runner).__name__, len(runner._graphs)))
    if number > 0:
        decode = decoder(StepPlan | StepRetired).decode
        while payload := to_follower.recv_bytes():
            message = decode(payload)
            if isinstance(message, StepPlan):
                runner.launch(message)
            else:
                runner.wait(message.step)
        pipe.send(runner._last_tokens.tolist())
        return

    def send(plan: bytes) -> None:
        with suppress(OSError):  # as the worker's: a rank's death is told elsewhere
            to_follower.send_bytes(plan)

    engine = make_engine(rank, configs(folder)[1], send=send)
    outputs: dict[str, list[int]] = {}
    while sampling := pipe.recv():
        for i, prompt in enumerate(PROMPTS):
            engine.add(
                EngineRequest(
                    request_id=str(i), token_ids=prompt, num_prompt_tokens=len(prompt), sampling=sampling[i]
                )
            )
        num_steps = 0
        try:
            while (step := engine.step()) is not None:
                for event in step.events:
                    outputs.setdefault(event.request_id, []).extend(getattr(event, "token_ids", []))
                num_steps += 1
                if sampling[0] == LONG and num_steps == 30:
                    pipe.send("decoding")
        except WorkerLost as error:
            pipe.send(str(error))
            os._exit(1)
        pipe.send([outputs.pop(str(i)) for i in range(len(PROMPTS))])
    send(b"")
    pipe.send(runner._last_tokens.tolist())


class Ranks:
    def __init__(self, folder: Path, timeout_s: float = LIMIT_S) -> None:
        receive, send = _SPAWN.Pipe(duplex=False)
        self.pipes: list[Connection] = []
        self.processes: list[BaseProcess] = []
        for number in range(SIZE):
            ours, theirs = _SPAWN.Pipe()
            arguments = (theirs, (send, receive)[number], folder, number, timeout_s)
            self.processes.append(_SPAWN.Process(target=be_rank, args=arguments, daemon=True))
            self.processes[-1].start()
            theirs.close()
            self.pipes.append(ours)

    def tell(self, number: int) -> Any:
        assert self.pipes[number].poll(LIMIT_S), f"rank {number} says nothing"
        return self.pipes[number].recv()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return make_checkpoint(tmp_path / "model", "qwen3", max_position_embeddings=1024)


@pytest.fixture
def ranks(folder: Path, request: pytest.FixtureRequest) -> Iterator[Ranks]:
    ranks = Ranks(folder, **getattr(request, "param", {}))
    yield ranks
    for process in ranks.processes:
        process.kill()
        process.join()


def test_two_ranks_make_the_tokens_of_one_in_float32(folder: Path, ranks: Ranks) -> None:
    """Greedy and drawn, prompts cut into chunks, decodes in graphs; every rank keeps the same tokens."""
    cpu = LLM(str(folder), device="cpu", dtype="float32", kv_cache_memory_bytes=POOL_BYTES)
    expected = [completion.token_ids for completion in cpu.generate(PROMPTS, SAMPLING)]
    for number in range(SIZE):
        name, num_graphs = ranks.tell(number)
        assert (name, num_graphs > 0) == ("CudaRunner", True)
    for _ in range(2):  # the second time most of each prompt is cached
        ranks.pipes[0].send(SAMPLING)
        assert ranks.tell(0) == expected
    ranks.pipes[0].send([])
    assert ranks.tell(0) == ranks.tell(1)


@pytest.mark.parametrize("ranks", [{"timeout_s": 2.0}], indirect=True)
def test_a_rank_that_takes_no_part_is_told_in_bounded_time(ranks: Ranks) -> None:
    """Of a rank that died a worker hears by its link, and ends; this is for one that hangs."""
    for number in range(SIZE):
        ranks.tell(number)
    ranks.pipes[0].send([LONG] * len(PROMPTS))
    assert ranks.tell(0) == "decoding"
    ranks.processes[1].kill()
    began = time.monotonic()
    words = ranks.tell(0)
    assert "rank" in words, words
    assert time.monotonic() - began < 10
    ranks.processes[0].join(10)
    assert ranks.processes[0].exitcode == 1


@pytest.mark.parametrize("backend", ["nixl", "nccl"])
def test_pools_of_two_ranks_and_one_serve_together_and_end_with_a_rank(
    folder: Path, tmp_path: Path, backend: str
) -> None:
    """Prefill by two ranks, decode by one, on the same GPU; then a rank is killed."""
    common = [str(folder), "--device", "cuda", "--dtype", "float32", "--attention-backend", "reference,cuda"]
    common += ["--kv-cache-memory-bytes", str(POOL_BYTES), "--max-num-seqs", "8", "--prefill-tp", "2"]
    common += ["--transport-backend", backend]
    prompt = PROMPTS[3]
    body = {"model": str(folder), "prompt": prompt, "max_tokens": 16, "temperature": 0, "ignore_eos": True}
    greedy = SamplingParams(max_tokens=16, temperature=0, ignore_eos=True)
    cpu = LLM(str(folder), device="cpu", dtype="float32", kv_cache_memory_bytes=POOL_BYTES)
    (expected,) = cpu.generate([prompt], [greedy])
    with running(*common, log=tmp_path / "log") as system:
        answer = system.http.post("/v1/completions", json=body, timeout=60)
        assert answer.status_code == 200, answer.text
        assert answer.json()["choices"][0]["text"] == expected.text
        record = system.record(answer.headers["x-request-id"])
        assert record["decision"] == "disaggregated"
        assert record["kv"]["bytes_received"] == record["kv"]["bytes_expected"] > 0
        assert record["kv"]["transport"] == backend
        worker = next(w for w in system.workers() if w["role"] == "prefill")
        os.kill(worker["rank_pids"][1], 9)
        gone = lambda: worker["pid"] not in [w["pid"] for w in system.workers() if w["state"] == "ready"]  # noqa: E731
        eventually(gone, "the worker of the killed rank is gone", within_s=5)
