"""Offline use: the Python class and the two commands over it."""

import json
from pathlib import Path

import pytest
from click.testing import CliRunner
from msgspec.structs import replace

import disagg
from disagg import LLM, SamplingParams
from disagg.cli.bench import bench
from disagg.cli.generate import generate
from disagg.errors import ConfigError, InvalidRequest, PromptTooLong
from support.checkpoints import make_checkpoint

OPTIONS = {
    "dtype": "float32",
    "device": "cpu",
    "num_threads": 1,
    "kv_cache_memory_bytes": 8 << 20,
    "max_num_seqs": 8,
}
FLAGS = [part for name, value in OPTIONS.items() for part in (f"--{name.replace('_', '-')}", str(value))]
GREEDY = SamplingParams(max_tokens=12, temperature=0, ignore_eos=True)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("tiny"), "llama")


@pytest.fixture(scope="module")
def llm(folder: Path) -> LLM:
    return LLM(str(folder), **OPTIONS)


def test_prompts_are_text_or_token_ids_one_or_several(llm: LLM) -> None:
    text = "the quick brown fox"
    token_ids = llm.encode(text)
    completions = [
        *llm.generate(text, GREEDY),
        *llm.generate(token_ids, GREEDY),
        *llm.generate([text], GREEDY),
        *llm.generate([token_ids, text], GREEDY),
    ]
    assert len(completions) == 5
    assert len({tuple(c.token_ids) for c in completions}) == 1
    assert all(c.prompt_token_ids == token_ids for c in completions)
    assert all(c.text == llm.tokenizer.decode(c.token_ids) for c in completions)
    assert {c.finish_reason for c in completions} == {"length"}
    assert llm.generate([], GREEDY) == []


def test_sampling_is_one_for_all_or_one_for_each(llm: LLM) -> None:
    each = [SamplingParams(max_tokens=n, temperature=0, ignore_eos=True) for n in (1, 5)]
    assert [len(c.token_ids) for c in llm.generate(["a", "b"], each)] == [1, 5]
    assert len(llm.generate("a")[0].token_ids) <= SamplingParams().max_tokens
    with pytest.raises(InvalidRequest, match="1 sampling parameters for 2 prompts"):
        llm.generate(["a", "b"], [GREEDY])


def test_chat_goes_through_the_template(llm: LLM) -> None:
    conversation = [{"role": "user", "content": "the dog"}]
    (completion,) = llm.chat(conversation, GREEDY)
    written = "<|im_start|>user\nthe dog<|im_end|>\n<|im_start|>assistant\n"
    assert completion.prompt_token_ids == llm.tokenizer.encode(written, add_special_tokens=False)
    assert llm.chat([conversation] * 2, GREEDY)[1].token_ids == completion.token_ids


def test_stream_is_the_text_in_pieces(llm: LLM) -> None:
    (whole,) = llm.generate("the quick brown fox", GREEDY)
    pieces = list(llm.stream("the quick brown fox", GREEDY))
    assert "".join(pieces) == whole.text
    assert len(pieces) > 3


@pytest.mark.parametrize(
    ("prompts", "sampling", "error", "message"),
    [
        ([[]], GREEDY, InvalidRequest, r"a prompt of 0 in 0 tokens \(prompt 0\)"),
        (["a", [1, 320]], GREEDY, InvalidRequest, r"below 320 \(prompt 1\)"),
        ("a", SamplingParams(max_tokens=-3), InvalidRequest, "max_tokens must be at least 1, got -3"),
        ([[5] * 600], GREEDY, PromptTooLong, "600 tokens leave no room in a context of 512"),
    ],
)
def test_bad_input_is_an_error_and_nothing_runs(
    llm: LLM, prompts: object, sampling: SamplingParams, error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        llm.generate(prompts, sampling)
    assert not llm.engine.has_work
    assert len(llm.generate("a", GREEDY)[0].token_ids) == 12


def test_leaving_a_stream_early_stops_it(llm: LLM) -> None:
    stream = llm.stream("the quick brown fox", SamplingParams(max_tokens=400, temperature=0, ignore_eos=True))
    next(stream)
    with pytest.raises(RuntimeError, match="in the middle of another call"):
        llm.generate("a", GREEDY)
    stream.close()
    stats = llm.engine.stats()
    assert (stats.running, stats.pages_in_use) == (0, 0)
    assert len(llm.generate("a", GREEDY)[0].token_ids) == 12
    llm.engine.audit()


def test_more_prompts_than_the_queue_takes_run_all_the_same(folder: Path) -> None:
    llm = LLM(str(folder), **OPTIONS)
    llm.engine._scheduler.limits = replace(llm.engine.limits, max_queued_tokens=40)
    prompts = [[3 + i] * 30 for i in range(12)]
    completions = llm.generate(prompts, GREEDY)
    assert [c.token_ids for c in completions] == [llm.generate(p, GREEDY)[0].token_ids for p in prompts]


def test_options_are_checked_by_name_and_range(folder: Path) -> None:
    with pytest.raises(ConfigError, match=r"LLM\(\) has no option 'max_seqs'; there are .*max_num_seqs"):
        LLM(str(folder), max_seqs=3)
    with pytest.raises(ConfigError, match="max_num_seqs"):
        LLM(str(folder), max_num_seqs=0)


def test_weights_tell_their_progress(folder: Path) -> None:
    told: list[tuple[int, int]] = []
    LLM(str(folder), progress=lambda done, total: told.append((done, total)), **OPTIONS)
    assert told[-1][0] == told[-1][1] > 0
    assert told == sorted(told)


def test_the_package_brings_torch_only_for_llm() -> None:
    assert disagg.LLM is LLM
    with pytest.raises(AttributeError, match="LLMs"):
        _ = disagg.LLMs


def test_generate_prints_the_text_alone(folder: Path, llm: LLM) -> None:
    (expected,) = llm.generate("the quick brown fox", SamplingParams(max_tokens=12, temperature=0))
    result = CliRunner().invoke(
        generate, ["the quick brown fox", "--model", str(folder), "--max-tokens", "12", *FLAGS]
    )
    assert result.exit_code == 0, result.output
    assert result.stdout == expected.text + "\n"


def test_generate_says_what_is_wrong_and_ends_in_2(folder: Path) -> None:
    result = CliRunner().invoke(generate, ["a", "--model", str(folder), "--max-tokens", "-3", *FLAGS])
    assert result.exit_code == 2
    assert "'--max-tokens': -3 is not in the range" in result.stderr


def test_bench_offline_reports_under_vllms_names(folder: Path, tmp_path: Path) -> None:
    file = tmp_path / "figures.json"
    flags = ["--num-prompts", "5", "--min-len", "4", "--max-len", "9", "--max-output-len", "6"]
    result = CliRunner().invoke(
        bench, ["offline", *flags, "--model", str(folder), "--output-json", str(file), *FLAGS]
    )
    assert result.exit_code == 0, result.output
    assert "output_throughput" in result.stderr
    figures = json.loads(file.read_text())
    assert (figures["completed"], figures["num_prompts"]) == (5, 5)
    assert figures["total_output_tokens"] == sum(figures["output_lens"])
    assert all(4 <= n <= 9 for n in figures["input_lens"])
    assert all(4 <= n <= 6 for n in figures["output_lens"])
    assert figures["output_throughput"] * figures["duration"] == pytest.approx(sum(figures["output_lens"]))
    for name in ("ttft", "tpot", "itl", "e2el"):
        quantiles = [figures[f"{kind}_{name}_ms"] for kind in ("median", "p90", "p95", "p99")]
        assert quantiles == sorted(quantiles)
        assert quantiles[0] > 0
