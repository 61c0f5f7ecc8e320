"""Whole engines on the GPU: their tokens are the CPU's in float32, however steps are run."""

import random
from pathlib import Path

import pytest
import torch

from disagg.checkpoint import ModelFiles
from disagg.config import EngineConfig, ModelConfig
from disagg.engine.build import load_rank
from disagg.engine.cuda_runner import CudaRunner
from disagg.engine.runner import ModelRunner
from disagg.llm import LLM
from disagg.models import Decoder, load_model, load_spec
from disagg.protocol import SamplingParams
from support.checkpoints import make_checkpoint
from support.paged import PagedDriver, PagedSequence

pytestmark = pytest.mark.gpu

NUM_OUTPUT = 40
LENGTHS = (1, 2, 15, 16, 17, 40, 100, 130, 3, 31, 64, 65, 200)
POOL_BYTES = 64 << 20


def make_prompts() -> list[list[int]]:
    rng = random.Random(3)
    return [[rng.randrange(3, 320) for _ in range(n)] for n in LENGTHS]


PROMPTS = make_prompts()
GREEDY = SamplingParams(max_tokens=NUM_OUTPUT, temperature=0, ignore_eos=True)
SEEDED = [
    SamplingParams(
        max_tokens=NUM_OUTPUT,
        temperature=0.3 + 0.1 * i,
        top_k=(0, 20, 0)[i % 3],
        top_p=(1.0, 0.9)[i % 2],
        min_p=(0.0, 0.0, 0.01)[i % 3],
        seed=i * 0x9E3779B97F4A7C15 % 2**64,
        ignore_eos=True,
    )
    for i in range(len(PROMPTS))
]


@pytest.fixture(scope="module", params=["llama", "qwen3", "qwen3_moe"])
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("tiny") / request.param, request.param)


@pytest.fixture(scope="module")
def shape_128(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Heads of 128 with norms, as Qwen3's."""
    sizes = {"num_attention_heads": 4, "head_dim": 128, "num_key_value_heads": 2}
    return make_checkpoint(tmp_path_factory.mktemp("shape") / "qwen3", "qwen3", **sizes)


def make_llm(folder: Path, device: str, **options: object) -> LLM:
    fields = {"dtype": "float32", "kv_cache_memory_bytes": POOL_BYTES, "max_num_seqs": 16}
    return LLM(str(folder), device=device, **{**fields, **options})


def tokens_of(llm: LLM, sampling: list[SamplingParams]) -> list[list[int]]:
    out = [completion.token_ids for completion in llm.generate(PROMPTS, sampling)]
    stats = llm.engine.stats()
    assert (stats.pages_in_use, stats.running, stats.waiting) == (0, 0, 0)
    llm.engine.audit()
    return out


@pytest.fixture(scope="module")
def expected(folder: Path) -> dict[str, list[list[int]]]:
    llm = make_llm(folder, "cpu")
    return {"greedy": tokens_of(llm, [GREEDY] * len(PROMPTS)), "seeded": tokens_of(llm, SEEDED)}


@pytest.mark.parametrize("budget", [16, 64, 1024])
def test_float32_tokens_are_the_cpus(folder: Path, expected: dict[str, list[list[int]]], budget: int) -> None:
    torch.backends.cuda.matmul.allow_tf32 = False
    llm = make_llm(folder, "cuda", max_num_batched_tokens=budget, attention_backend="reference,cuda")
    assert tokens_of(llm, [GREEDY] * len(PROMPTS)) == expected["greedy"]
    assert tokens_of(llm, SEEDED) == expected["seeded"]


def test_a_mixed_step_does_not_disturb_decodes(folder: Path, expected: dict[str, list[list[int]]]) -> None:
    """Prompts that come one by one meet the decodes of those before them in one step."""
    llm = make_llm(
        folder, "cuda", max_num_batched_tokens=32, max_num_seqs=4, attention_backend="reference,cuda"
    )
    assert tokens_of(llm, [GREEDY] * len(PROMPTS)) == expected["greedy"]


def shortfall(decoder: Decoder, outputs: list[list[int]]) -> float:
    """How far a token lies at most below the likeliest, in standard deviations of the logits."""
    short = []
    for prompt, output in zip(PROMPTS, outputs, strict=True):
        driver = PagedDriver(decoder, attention="reference")
        whole = PagedSequence(prompt + output)
        at = range(len(prompt) - 1, len(prompt) + len(output) - 1)
        logits = driver.step([(whole, len(whole.token_ids))], logits_at=at)
        chosen = logits.gather(1, torch.tensor(output)[:, None])[:, 0]
        short.append((logits.amax(1) - chosen) / logits.std(1))
    return torch.cat(short).max().item()


@pytest.mark.parametrize("backend", ["auto", "fi", "fi,cuda", "reference"])
def test_every_bfloat16_token_is_near_the_likeliest(backend: str, shape_64: Path) -> None:
    """Judged by float32 logits of the same tokens on the CPU, within what rounding to bfloat16 moves them."""
    llm = make_llm(shape_64, "cuda", dtype="bfloat16", attention_backend=backend)
    outputs = tokens_of(llm, [GREEDY] * len(PROMPTS))
    worst = shortfall(load_model(ModelFiles(shape_64, "m", "test"), load_spec(shape_64)), outputs)
    print(f"{backend}: the worst token is {worst:.3f} standard deviations of its logits below the likeliest")
    assert worst < 0.3


def test_kv_of_a_byte_takes_half_the_memory_and_keeps_the_tokens_likely(shape_128: Path) -> None:
    """Graphs, mixed steps and chunks; judged as bfloat16 is, with more room: three bits of mantissa."""
    options = {"dtype": "bfloat16", "max_num_batched_tokens": 64}
    wide, narrow = (make_llm(shape_128, "cuda", kv_cache_dtype=kv, **options) for kv in ("auto", "fp8"))
    assert narrow.engine.stats().pages_total >= 2 * wide.engine.stats().pages_total
    decoder = load_model(ModelFiles(shape_128, "m", "test"), load_spec(shape_128))
    worst = shortfall(decoder, tokens_of(narrow, [GREEDY] * len(PROMPTS)))
    print(f"KV in fp8: the worst token is {worst:.3f} standard deviations of its logits below the likeliest")
    assert worst < 1.0


def test_plans_ask_for_the_kernels_that_are_loaded_at_start(shape_64: Path) -> None:
    """Those are compiled ahead; any other would be compiled in the middle of a request."""
    loaded = pytest.importorskip("flashinfer.prefill").get_batch_prefill_module
    llm = make_llm(shape_64, "cuda", dtype="bfloat16", attention_backend="fi,fi")
    num_loaded = loaded.cache_info().misses
    tokens_of(llm, [GREEDY] * len(PROMPTS))
    assert num_loaded > 0
    assert loaded.cache_info().misses == num_loaded


def test_every_token_by_eight_bit_weights_is_near_the_likeliest(shape_64: Path) -> None:
    """Judged by float32 and the same weights on the CPU; bfloat16 by torch's operators is 0.65 short."""
    llm = make_llm(shape_64, "cuda", dtype="bfloat16", quantization="fp8")
    outputs = tokens_of(llm, [GREEDY] * len(PROMPTS))
    decoder = load_model(ModelFiles(shape_64, "m", "test"), load_spec(shape_64), quantization="fp8")
    worst = shortfall(decoder, outputs)
    print(f"fp8: the worst token is {worst:.3f} standard deviations of its logits below the likeliest")
    assert worst < 1.2


@pytest.fixture(scope="module")
def shape_64(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Heads of 64 and a group of 3, as the default model has."""
    return make_checkpoint(
        tmp_path_factory.mktemp("shape"),
        "llama",
        hidden_size=576,
        num_attention_heads=9,
        head_dim=64,
        num_key_value_heads=3,
        intermediate_size=1536,
    )


def test_a_gpu_gets_graphs(folder: Path) -> None:
    model = ModelConfig(model=str(folder), device="cuda", dtype="bfloat16")
    engine = EngineConfig(
        kv_cache_memory_bytes=POOL_BYTES, max_num_seqs=16, attention_backend="reference,cuda"
    )
    rank = load_rank(model, engine)
    assert isinstance(rank.runner, CudaRunner)
    assert not isinstance(rank.runner, ModelRunner)
    assert rank.runner.depth == 1
