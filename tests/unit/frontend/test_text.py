"""Tokenizing: what is added, what is refused, and how long it may take."""

import json
from pathlib import Path

import pytest
from tokenizers import Tokenizer as HfTokenizer
from tokenizers import processors

from disagg.errors import ConfigError, InvalidRequest, Overloaded, PromptTooLong
from disagg.frontend import TextModel, Tokenizer
from disagg.frontend import text as text_module
from disagg.frontend.schemas import ChatCall, CompletionCall, parse_chat, parse_completion
from support.checkpoints import write_tokenizer

pytestmark = pytest.mark.anyio


def completion(prompt: object) -> CompletionCall:
    return parse_completion(json.dumps({"model": "m", "prompt": prompt}).encode())


def chat(content: str) -> ChatCall:
    return parse_chat(json.dumps({"model": "m", "messages": [{"role": "user", "content": content}]}).encode())


@pytest.fixture
def with_bos(tmp_path: Path) -> Path:
    """A model that begins every text with BOS, and whose template writes it out, as Llama 3's."""
    write_tokenizer(tmp_path)
    tokenizer = HfTokenizer.from_file(str(tmp_path / "tokenizer.json"))
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<|endoftext|> $A", special_tokens=[("<|endoftext|>", 0)]
    )
    tokenizer.enable_truncation(4)
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    config = json.loads((tmp_path / "tokenizer_config.json").read_text())
    config["chat_template"] = "{{ bos_token }}{{ messages[0].content }}"
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    return tmp_path


async def test_bos_is_there_once(with_bos: Path) -> None:
    """Doubled, it changes every answer a little, and nobody notices."""
    text = TextModel.from_folder(with_bos)
    for call in (completion("the"), completion("<|endoftext|>the")):
        (token_ids,) = await text.encode_prompts(call, 0, 100)
        assert token_ids.count(0) == 1
        assert token_ids[0] == 0
    (token_ids,) = await text.encode_chat(chat("the"), 0, 100)
    assert token_ids.count(0) == 1
    text.close()


async def test_truncation_in_the_file_is_off(with_bos: Path) -> None:
    """Some tokenizer files still hold their training's limit; prompts are never clamped."""
    text = TextModel.from_folder(with_bos)
    (token_ids,) = await text.encode_prompts(completion("the quick brown fox jumps"), 0, 100)
    assert len(token_ids) > 5
    text.close()


async def test_text_of_special_tokens_alone_is_a_prompt(text: TextModel) -> None:
    assert await text.encode_prompts(completion("<|im_start|>"), 0, 100) == [[1]]


async def test_model_without_a_template_says_where_to_go(folder: Path) -> None:
    text = TextModel(Tokenizer.from_folder(folder), None)
    with pytest.raises(InvalidRequest, match="/v1/completions"):
        await text.encode_chat(chat("hi"), 0, 100)
    text.close()


@pytest.mark.parametrize("words", ["1 " * 200_000, " " * 400_000, "x" * 400_000, "the quick " * 40_000])
async def test_what_cannot_fit_is_refused_after_a_part_of_it(
    text: TextModel, monkeypatch: pytest.MonkeyPatch, words: str
) -> None:
    """Tokenizing megabytes takes seconds, and a few such requests would make everybody wait."""
    encoded = 0
    encode = text.tokenizer.encode

    def counting(part: str, add_special_tokens: bool) -> list[int]:
        nonlocal encoded
        encoded += len(part)
        return encode(part, add_special_tokens)

    monkeypatch.setattr(text.tokenizer, "encode", counting)
    with pytest.raises(PromptTooLong) as caught:
        await text.encode_prompts(completion(words), len(words), 10_000)
    assert caught.value.param == "prompt"
    assert encoded <= 10_000 * 16


async def test_counting_by_piece_refuses_nothing_that_fits(
    text: TextModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Cuts in the middle of words make more tokens than there are."""
    monkeypatch.setattr(text_module, "_USUAL_CHARS_PER_TOKEN", 1)
    encode = text.tokenizer.encode
    more = 0
    for padding in range(10):
        words = "x" * padding + "the quick language through" * 50
        num_tokens = len(encode(words, False))
        pieces = len(encode(words[:num_tokens], False)) + len(encode(words[num_tokens:], False))
        more += pieces > num_tokens
        (token_ids,) = await text.encode_prompts(completion(words), 0, num_tokens)
        assert len(token_ids) == num_tokens
    assert more, "else no cut was in the middle of a token"


async def test_a_chat_that_cannot_fit_is_not_even_rendered(
    text: TextModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert text.template is not None
    monkeypatch.delattr(type(text.template), "render")
    with pytest.raises(PromptTooLong) as caught:
        await text.encode_chat(chat("the " * 100_000), 0, 1000)
    assert caught.value.param == "messages"


async def test_only_so_much_waits_for_the_tokenizer(text: TextModel, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(text_module, "MAX_WAITING_BYTES", 10_000)
    with pytest.raises(Overloaded):
        await text.encode_prompts(completion("the"), 10_001, 100)
    assert await text.encode_prompts(completion("the"), 9_999, 100)
    assert await text.encode_prompts(completion("the"), 9_999, 100), "the bytes were given back"


def test_damaged_files_end_the_start(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"tokenizer\.json"):
        TextModel.from_folder(tmp_path)
    write_tokenizer(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text("{")
    with pytest.raises(ConfigError, match=r"tokenizer_config\.json"):
        TextModel.from_folder(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text("[]")
    with pytest.raises(ConfigError, match=r"tokenizer_config\.json"):
        TextModel.from_folder(tmp_path)
