"""The main job end to end: what the default model says through P/D is what transformers says."""

import json
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from support.checkpoints import make_checkpoint
from support.system import DEFAULT_MODEL, System, running

pytestmark = pytest.mark.timeout(900)

OUTPUT_TOKENS = 32


def prompts() -> list[str]:
    """20 prompts: short, long, unicode, shared prefixes."""
    story = "The lighthouse keeper wrote in his log that the sea had been calm for nine days. "
    shared = "You are a careful assistant. Answer in one sentence and name your source. " * 12
    return [
        "Hello",
        "The capital of France is",
        "def fibonacci(n):\n",
        "1 + 1 =",
        "Ünïcödé: 你好，世界! Здравствуй, мир! 🌍🚀",
        "こんにちは。今日の天気は",
        "مرحبا بالعالم",
        "🙂🙃" * 20,
        " \n\t  leading and trailing space   ",
        "<|im_start|>user\nWhat is gravity?<|im_end|>\n<|im_start|>assistant\n",
        story * 160,  # 3,000 tokens and more
        story * 160 + "On the tenth day",
        story * 20,
        shared + "What is the tallest mountain?",
        shared + "What is the longest river?",
        shared + "What is the largest desert?",
        shared,
        "Q: Name three primary colours.\nA:",
        "Once upon a time, in a village by the sea, there lived",
        "SELECT name, age FROM users WHERE",
    ]


@pytest.fixture(scope="module")
def expected() -> list[str]:
    """Greedy fp32 output of transformers, and nothing of ours but the converted checkpoint."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from disagg.checkpoint import resolve

    path = resolve(DEFAULT_MODEL).path
    tokenizer = AutoTokenizer.from_pretrained(path)
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
    outputs = []
    for prompt in prompts():
        ids = tokenizer(prompt, return_tensors="pt", add_special_tokens=False)
        with torch.inference_mode():
            out = model.generate(**ids, max_new_tokens=OUTPUT_TOKENS, do_sample=False)
        new = out[0, ids["input_ids"].shape[1] :]
        outputs.append(tokenizer.decode(new, skip_special_tokens=True))
    return outputs


def ask_all(system: System) -> list[tuple[str, dict[str, Any]]]:
    """Every prompt at once; the text and the ledger record of each."""

    def ask(prompt: str) -> tuple[str, dict[str, Any]]:
        answer = system.complete(prompt, max_tokens=OUTPUT_TOKENS)
        assert answer.status_code == 200, answer.text
        return answer.json()["choices"][0]["text"], system.record(answer.headers["x-request-id"])

    with ThreadPoolExecutor(len(prompts())) as pool:
        return list(pool.map(ask, prompts()))


TOPOLOGIES = {
    "1+1": [],
    "2+2": ["--prefill", "2", "--decode", "2"],
    "tp3-to-tp1": ["--prefill-tp", "3"],
    "tp1-to-tp3": ["--decode-tp", "3"],
}


@pytest.fixture(scope="module", params=list(TOPOLOGIES))
def system(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[System]:
    log: Path = tmp_path_factory.mktemp("serve") / "log"
    flags = ["--dtype", "float32", "--num-threads", "1", *TOPOLOGIES[request.param]]
    with running(*flags, log=log) as system:
        yield system


@pytest.mark.parametrize("cache", ["cold", "warm"])
def test_greedy_output_equals_transformers(system: System, expected: list[str], cache: str) -> None:
    """Token for token, whatever was cached and however the heads are split."""
    answers = ask_all(system)
    assert [text for text, _ in answers] == expected
    for _, record in answers:
        assert record["decision"] == "disaggregated", json.dumps(record)
        assert record["kv"]["bytes_received"] == record["kv"]["bytes_expected"] > 0, json.dumps(record)
    if cache == "warm":
        assert sum(record["cached_tokens"]["decode"] for _, record in answers) > 3000
    system.assert_nothing_held()


def test_a_shape_without_weights_is_served_with_dummies(tmp_path: Path) -> None:
    """A benchmark needs no checkpoint of gigabytes, only config and tokenizer."""
    folder = make_checkpoint(tmp_path / "shape")
    for weights in folder.glob("*.safetensors*"):
        weights.unlink()
    with running(str(folder), "--load-format", "dummy", log=tmp_path / "log") as system:
        answer = system.complete("the quick", model=str(folder), max_tokens=4, ignore_eos=True)
        assert answer.status_code == 200, answer.text
        assert answer.json()["usage"]["completion_tokens"] == 4
