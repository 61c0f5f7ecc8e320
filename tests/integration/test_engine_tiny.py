"""Whole engines over tiny random checkpoints: their text is transformers', however it is scheduled."""

import queue
import random
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from msgspec.structs import replace
from transformers import AutoModelForCausalLM

from disagg.config import EngineConfig, ModelConfig
from disagg.engine import ChunkDone, Engine, EngineRequest, Reservation, StepPlan
from disagg.engine.build import Rank, build_engine, load_rank, make_engine
from disagg.errors import ConfigError
from disagg.kv import PageLayout
from disagg.llm import LLM
from disagg.models import load_spec
from disagg.parallel import Meeting, MeetingStore, TensorParallel
from disagg.protocol import SamplingParams, decoder
from support.checkpoints import END, make_checkpoint

NUM_OUTPUT = 24
POOL_BYTES = 8 << 20
LENGTHS = (1, 2, 15, 16, 17, 40, 100, 130, 3)
FAMILIES = ("llama", "qwen3", "qwen3_moe")

Tokens = list[int]


def make_prompts() -> list[Tokens]:
    """Random ones, some of which share their first two pages."""
    rng = random.Random(3)
    shared = [rng.randrange(3, 320) for _ in range(32)]
    prompts = [[rng.randrange(3, 320) for _ in range(n)] for n in LENGTHS]
    return prompts + [shared + [rng.randrange(3, 320) for _ in range(n)] for n in (1, 9, 30)] + [shared]


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
        choice_index=i % 2,
        ignore_eos=True,
    )
    for i in range(len(PROMPTS))
]


@pytest.fixture(scope="module", params=FAMILIES)
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("tiny") / request.param, request.param)


@pytest.fixture(scope="module")
def expected(folder: Path) -> list[Tokens]:
    """Greedy continuations by transformers in float32.

    Found by one of its passes a prompt: where each token of a proposal is the likeliest after
    those before it, the proposal is what transformers would have said token by token.
    """
    torch.set_num_threads(1)  # tests share the cores, and a barrier costs more than these matrices
    proposals = [c.token_ids for c in make_llm(folder).generate(PROMPTS, [GREEDY] * len(PROMPTS))]
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    for prompt, proposal in zip(PROMPTS, proposals, strict=True):
        assert len(proposal) == NUM_OUTPUT
        with torch.inference_mode():
            logits = model(torch.tensor([prompt + proposal]), use_cache=False).logits[0]
        assert logits[len(prompt) - 1 : -1].argmax(-1).tolist() == proposal
    return proposals


@pytest.fixture(scope="module")
def seeded(folder: Path) -> list[Tokens]:
    """Each prompt drawn alone by a fresh engine."""
    llm = make_llm(folder, prefix_cache="none")
    return [llm.generate(p, [s])[0].token_ids for p, s in zip(PROMPTS, SEEDED, strict=True)]


def make_llm(folder: Path, **options: Any) -> LLM:
    defaults = {
        "dtype": "float32",
        "device": "cpu",
        "num_threads": 1,
        "max_num_seqs": 16,
        "kv_cache_memory_bytes": POOL_BYTES,
    }
    if (num_pages := options.pop("num_pages", None)) is not None:
        spec = load_spec(folder)
        token_bytes = spec.num_kv_heads * spec.num_layers * 2 * spec.head_dim * 4
        options["kv_cache_memory_bytes"] = num_pages * options["block_size"] * token_bytes
    return LLM(str(folder), **{**defaults, **options})


def check_idle(engine: Engine) -> None:
    engine.audit()
    stats = engine.stats()
    assert (stats.pages_in_use, stats.running, stats.waiting, stats.reserved, stats.held) == (0, 0, 0, 0, 0)


SCHEDULES: dict[str, dict[str, Any]] = {
    "whole prompts": {},
    "chunks of a page": {"max_num_batched_tokens": 16, "max_num_seqs": 4},
    "chunks that end anywhere": {"max_num_batched_tokens": 7, "max_num_seqs": 3},
    "one at a time": {"max_num_seqs": 1},
    "small pages": {"block_size": 4, "max_num_batched_tokens": 50},
    "no prefix cache": {"prefix_cache": "none"},
    # Room for one of the longest and little more, so that others are handed back and replayed.
    "hardly any pages": {"num_pages": 42, "block_size": 4, "max_num_batched_tokens": 40},
}


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_text_does_not_depend_on_the_schedule(
    folder: Path, expected: list[Tokens], seeded: list[Tokens], schedule: str
) -> None:
    """Greedy is transformers' token for token; seeded is what each prompt gives alone. Cold, then warm."""
    llm = make_llm(folder, **SCHEDULES[schedule])
    for attempt in ("cold", "warm"):
        greedy = llm.generate(PROMPTS, [GREEDY] * len(PROMPTS))
        assert [c.token_ids for c in greedy] == expected, attempt
        drawn = llm.generate(PROMPTS, SEEDED)
        assert [c.token_ids for c in drawn] == seeded, attempt
        check_idle(llm.engine)
    handed_back = llm.engine.stats().num_handed_back
    assert (handed_back > 0) == (schedule == "hardly any pages")


def test_a_warm_cache_is_used(folder: Path, expected: list[Tokens]) -> None:
    """All full pages of a prompt but the last token's are found again."""
    llm = make_llm(folder)
    cold = [llm.generate(prompt, GREEDY)[0] for prompt in PROMPTS]
    warm = [llm.generate(prompt, GREEDY)[0] for prompt in PROMPTS]
    assert [c.token_ids for c in warm] == [c.token_ids for c in cold] == expected
    assert [c.cached_tokens for c in cold] == [0] * len(LENGTHS) + [0, 32, 32, 16]
    assert [c.cached_tokens for c in warm] == [(len(prompt) - 1) // 16 * 16 for prompt in PROMPTS]


def test_seeded_text_is_the_same_in_any_company(folder: Path, seeded: list[Tokens]) -> None:
    """Also in another order, beside greedy ones, and beside its own copies."""
    llm = make_llm(folder, max_num_batched_tokens=48, max_num_seqs=24)
    order = list(range(len(PROMPTS)))
    random.Random(5).shuffle(order)
    prompts = [PROMPTS[i] for i in order for _ in range(2)]
    sampling = [s for i in order for s in (SEEDED[i], replace(GREEDY, max_tokens=5))]
    outputs = llm.generate(prompts, sampling)
    assert [c.token_ids for c in outputs[::2]] == [seeded[i] for i in order]
    copies = llm.generate([PROMPTS[5]] * 8, [SEEDED[5]] * 8)
    assert [c.token_ids for c in copies] == [seeded[5]] * 8


def test_choices_of_one_seed_differ(folder: Path) -> None:
    llm = make_llm(folder)
    sampling = SamplingParams(max_tokens=12, temperature=1.5, seed=1, ignore_eos=True)
    outputs = [tuple(c.token_ids) for c in llm.generate([PROMPTS[5]] * 6, sampling)]
    assert len(set(outputs)) == 6


@pytest.mark.parametrize("at", [0, 7, NUM_OUTPUT - 1])
def test_a_replay_is_the_same_text(
    folder: Path, expected: list[Tokens], seeded: list[Tokens], at: int
) -> None:
    """What the router does after a decode worker's death, at any position of the output."""
    engine = make_llm(folder).engine
    for i, prompt in enumerate(PROMPTS):
        for name, sampling, output in (("g", GREEDY, expected[i]), ("s", SEEDED[i], seeded[i])):
            engine.add(
                EngineRequest(
                    request_id=f"{name}{i}",
                    token_ids=prompt + output[:at],
                    num_prompt_tokens=len(prompt),
                    sampling=sampling,
                )
            )
    outputs = run(engine)
    assert [outputs[f"g{i}"] for i in range(len(PROMPTS))] == [output[at:] for output in expected]
    assert [outputs[f"s{i}"] for i in range(len(PROMPTS))] == [output[at:] for output in seeded]
    check_idle(engine)


def test_end_tokens_end_the_text(folder: Path, expected: list[Tokens]) -> None:
    """The checkpoint has two; any token can be made a third."""
    llm = make_llm(folder)
    stop = expected[5][6]
    end = expected[5].index(stop) + 1
    (completion,) = llm.generate(PROMPTS[5], replace(GREEDY, stop_token_ids=(stop,)))
    assert (completion.token_ids, completion.finish_reason) == (expected[5][:end], "stop")
    sampling = SamplingParams(max_tokens=300, temperature=2.0, seed=3)
    reasons = [c for c in llm.generate([PROMPTS[3]] * 16, sampling) if c.finish_reason == "stop"]
    assert reasons, "two tokens in 320 end it, so some do"
    assert all(c.token_ids[-1] in (0, END) for c in reasons)
    assert not any({0, END} & set(c.token_ids[:-1]) for c in reasons)


def run(engine: Engine) -> dict[str, Tokens]:
    outputs: dict[str, Tokens] = {}
    while (step := engine.step()) is not None:
        for event in step.events:
            if not isinstance(event, ChunkDone):
                outputs.setdefault(event.request_id, []).extend(event.token_ids)
    return outputs


def configs(folder: Path, **options: Any) -> tuple[ModelConfig, EngineConfig]:
    engine = EngineConfig(
        **{"kv_cache_memory_bytes": POOL_BYTES, "num_threads": 1, "max_num_seqs": 8, **options}
    )
    return ModelConfig(model=str(folder), dtype="float32", device="cpu"), engine


@pytest.mark.parametrize("size", [2, 3])
def test_ranks_that_follow_make_the_same_text(folder: Path, expected: list[Tokens], size: int) -> None:
    """Plans as bytes, each rank with its heads; ranks are threads here."""
    model, config = configs(folder, tensor_parallel_size=size, max_num_batched_tokens=40)
    meeting = Meeting()
    links: list[queue.SimpleQueue[bytes | None]] = [queue.SimpleQueue() for _ in range(size - 1)]

    def join(rank: int) -> tuple[Rank, TensorParallel]:
        tp = TensorParallel.join(MeetingStore(meeting.put, meeting.get), rank, size)
        return load_rank(model, config, tp=tp), tp

    def follower(rank: int) -> None:
        loaded, tp = join(rank)
        while (plan := links[rank - 1].get()) is not None:
            loaded.runner.launch(decoder(StepPlan).decode(plan))
        tp.close()

    def send(plan: bytes | None) -> None:
        for link in links:
            link.put(plan)  # type: ignore[arg-type]

    threads = [threading.Thread(target=follower, args=(rank,)) for rank in range(1, size)]
    for thread in threads:
        thread.start()
    rank, tp = join(0)
    try:
        engine = make_engine(rank, config, send=send)
        for i, prompt in enumerate(PROMPTS):
            request = EngineRequest(
                request_id=str(i), token_ids=prompt, num_prompt_tokens=len(prompt), sampling=GREEDY
            )
            engine.add(request)
        outputs = run(engine)
    finally:
        send(None)
        for thread in threads:
            thread.join()
        tp.close()
    assert [outputs[str(i)] for i in range(len(PROMPTS))] == expected
    check_idle(engine)


def test_kv_that_comes_from_another_engine_decodes_to_the_same_text(
    folder: Path, expected: list[Tokens], seeded: list[Tokens]
) -> None:
    """Prefill in one, decode in another, pages copied as the transfer does: whole, chunk by chunk."""
    model, config = configs(folder, max_num_batched_tokens=32)
    source, target = load_rank(model, config), load_rank(model, config)
    here, there = make_engine(source, config), make_engine(target, config)
    for i, prompt in enumerate(PROMPTS):
        for sampling, output in ((GREEDY, expected[i]), (SEEDED[i], seeded[i])):
            request = EngineRequest(
                request_id="r", token_ids=prompt, num_prompt_tokens=len(prompt), sampling=sampling
            )
            reservation = there.reserve(request, cap_match=True)
            assert isinstance(reservation, Reservation)
            here.add(replace(request, prefill_only=True))
            first, sent = [], reservation.first_missing_page
            while (step := here.step()) is not None:
                for event in step.events:
                    if isinstance(event, ChunkDone):
                        pages = slice(sent, len(event.page_ids))
                        target.pool[reservation.page_ids[pages]] = source.pool[event.page_ids[pages]]
                        sent = max(sent, len(event.page_ids))
                    else:
                        first += event.token_ids
            assert sent == len(reservation.page_ids) > reservation.first_missing_page
            here.release("r")
            there.start("r", first[0], finished=False)
            assert first + run(there)["r"] == output
            check_idle(here)
            check_idle(there)


def test_aborts_leave_the_others_text_alone(folder: Path, expected: list[Tokens]) -> None:
    engine = make_llm(folder, max_num_batched_tokens=40).engine
    rng = random.Random(7)
    outputs: dict[str, Tokens] = {}
    for i, prompt in enumerate(PROMPTS * 2):
        request = EngineRequest(
            request_id=str(i), token_ids=prompt, num_prompt_tokens=len(prompt), sampling=GREEDY
        )
        engine.add(request)
    aborted = {str(i) for i in range(len(PROMPTS), 2 * len(PROMPTS))}
    pending = sorted(aborted)
    while (step := engine.step()) is not None:
        for event in step.events:
            outputs.setdefault(event.request_id, []).extend(event.token_ids)
        if pending and rng.random() < 0.6:
            engine.abort(pending.pop())
            engine.audit()
    assert [outputs[str(i)] for i in range(len(PROMPTS))] == expected
    check_idle(engine)


def test_bfloat16_runs_the_same_way_in_any_schedule(folder: Path) -> None:
    """No promise of equal text there, but lengths, ends and pages are the same."""
    llm = make_llm(folder, dtype="bfloat16", max_num_batched_tokens=33)
    assert [len(c.token_ids) for c in llm.generate(PROMPTS, GREEDY)] == [NUM_OUTPUT] * len(PROMPTS)
    check_idle(llm.engine)


def test_dummy_weights_need_no_weights(folder: Path, tmp_path: Path) -> None:
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json"):
        (tmp_path / name).write_bytes((folder / name).read_bytes())
    (tmp_path / "model.safetensors").write_bytes((folder / "model.safetensors").read_bytes())
    a, b = (make_llm(tmp_path, load_format="dummy", seed=seed) for seed in (0, 1))
    first = a.generate(PROMPTS[5], GREEDY)[0].token_ids
    assert len(first) == NUM_OUTPUT
    assert first != b.generate(PROMPTS[5], GREEDY)[0].token_ids


@pytest.mark.parametrize(
    ("model", "engine", "message"),
    [
        ({"max_model_len": 513}, {}, "max_model_len 513 is more than the model's context of 512"),
        ({"max_model_len": 500}, {"kv_cache_memory_bytes": 1 << 20}, "does not fit a KV pool of"),
        ({}, {"kv_cache_memory_bytes": 100}, "must hold at least one page; raise kv_cache_memory_bytes"),
        ({}, {"tensor_parallel_size": 2}, "needs one process a rank"),
        ({}, {"max_num_batched_tokens": 7}, "every running sequence must fit one step"),
        ({}, {"attention_backend": "fi"}, "fi runs on an NVIDIA GPU"),
        ({"device": "cuda"}, {}, "torch finds no GPU"),
    ],
)
def test_what_cannot_work_is_said_at_start(folder: Path, model: dict, engine: dict, message: str) -> None:
    if model.get("device") == "cuda" and torch.cuda.is_available():
        pytest.skip("this machine has a GPU")
    base, config = configs(folder)
    with pytest.raises(ConfigError, match=message):
        build_engine(replace(base, **model), replace(config, **engine))


def test_the_context_is_what_the_pool_holds(folder: Path) -> None:
    """A small pool makes a short context, rather than requests that never fit."""
    model, config = configs(folder, kv_cache_memory_bytes=1 << 20)
    rank = load_rank(model, config)
    assert rank.max_model_len == rank.num_pages * 16 + 1 < 512
    assert rank.pool.shape == (rank.num_pages, *PageLayout.of(rank.layout).shape)
    assert rank.pool.nbytes <= 1 << 20
