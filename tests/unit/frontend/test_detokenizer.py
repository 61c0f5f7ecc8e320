"""Text comes out piece by piece, and the pieces are what the whole decodes to."""

from functools import cache
from itertools import chain

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import AddedToken, decoders, models, normalizers, pre_tokenizers
from tokenizers import Tokenizer as HfTokenizer

from disagg.frontend import Tokenizer
from disagg.frontend.detokenizer import ByteDetokenizer, ContextDetokenizer, Detokenizer
from support.checkpoints import _tokenizer_json


@cache
def byte_level() -> HfTokenizer:
    tokenizer = HfTokenizer.from_str(_tokenizer_json(320))
    tokenizer.add_tokens([AddedToken("<think>", special=False), AddedToken("naïve", special=False)])
    return tokenizer


@cache
def byte_fallback() -> HfTokenizer:
    """As Llama 2 and Gemma have it: a mark for spaces, and a token for every byte of other characters."""
    words = ["▁", "▁the", "▁fox", "a", "b", "é", "世", "▁a", "ab"]
    vocabulary = {"<unk>": 0, "<s>": 1, "</s>": 2} | {f"<0x{byte:02X}>": byte + 3 for byte in range(256)}
    vocabulary |= {word: 259 + index for index, word in enumerate(words)}
    tokenizer = HfTokenizer(models.BPE(vocabulary, [], unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    tokenizer.add_special_tokens(["<unk>", "<s>", "</s>"])
    return tokenizer


@cache
def word_piece() -> HfTokenizer:
    words = ["[UNK]", "the", "fox", "##es", "jump", "##ed", ".", ","]
    tokenizer = HfTokenizer(
        models.WordPiece({word: index for index, word in enumerate(words)}, unk_token="[UNK]")
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.decoder = decoders.WordPiece()
    return tokenizer


def in_pieces(detokenizer: Detokenizer, token_ids: list[int], cuts: list[int]) -> list[str]:
    pieces: list[str] = []
    start = 0
    for size in cuts:
        pieces.append(detokenizer.push(token_ids[start : start + size]))
        start += size
    return [*pieces, detokenizer.push(token_ids[start:]), detokenizer.flush()]


sizes = st.lists(st.integers(0, 4), max_size=40)


@given(st.lists(st.integers(0, 321), max_size=60), sizes)
def test_byte_level_pieces_are_the_whole(token_ids: list[int], cuts: list[int]) -> None:
    """Whatever the tokens: bytes that are no UTF-8, characters cut at every byte, special tokens between."""
    detokenizer = Tokenizer(byte_level()).detokenizer()
    assert isinstance(detokenizer, ByteDetokenizer)
    assert "".join(in_pieces(detokenizer, token_ids, cuts)) == byte_level().decode(token_ids)


@given(st.text(max_size=40), sizes)
def test_byte_level_text_survives_the_round_trip(text: str, cuts: list[int]) -> None:
    tokenizer = Tokenizer(byte_level())
    token_ids = tokenizer.encode(text, False)
    assert "".join(in_pieces(tokenizer.detokenizer(), token_ids, cuts)) == text
    assert tokenizer.decode(token_ids) == text


@given(st.text("aé世🦊 \u200d\U0001f3fd", max_size=20), sizes)
def test_no_piece_of_valid_text_has_a_replacement_character(text: str, cuts: list[int]) -> None:
    """Half a character is never shown, not even for a moment."""
    tokenizer = Tokenizer(byte_level())
    pieces = in_pieces(tokenizer.detokenizer(), tokenizer.encode(text, False), cuts)
    assert not any("\ufffd" in piece for piece in pieces)


@pytest.mark.parametrize("kind", [byte_fallback, word_piece])
def test_other_vocabularies_are_decoded_in_context(kind: object) -> None:
    tokenizer = {byte_fallback: byte_fallback, word_piece: word_piece}[kind]()  # type: ignore[index]
    assert isinstance(Tokenizer(tokenizer).detokenizer(), ContextDetokenizer)


@given(st.text("ab é世🦊the fox", max_size=30), sizes)
def test_byte_fallback_pieces_are_the_whole(text: str, cuts: list[int]) -> None:
    tokenizer = Tokenizer(byte_fallback())
    token_ids = tokenizer.encode(text, False)
    pieces = in_pieces(tokenizer.detokenizer(), token_ids, cuts)
    assert "".join(pieces) == byte_fallback().decode(token_ids)
    assert not any("\ufffd" in piece for piece in pieces)


words = st.sampled_from([[0], [1], [2], *([token_id] for token_id in range(259, 268))])
spelt = st.characters(exclude_categories=["Cs"]).map(lambda char: [byte + 3 for byte in char.encode()])


@given(st.lists(words | spelt, max_size=20).map(lambda runs: list(chain(*runs))), sizes)
def test_byte_fallback_pieces_of_any_tokens_that_spell_characters(
    token_ids: list[int], cuts: list[int]
) -> None:
    """Also where the model spells what has a token, or a NUL, or says special tokens between."""
    detokenizer = Tokenizer(byte_fallback()).detokenizer()
    assert "".join(in_pieces(detokenizer, token_ids, cuts)) == byte_fallback().decode(token_ids)


def test_byte_fallback_gives_up_on_a_broken_character_alone() -> None:
    """Decoded whole, the run of byte tokens is lost with it; but its beginning has been sent by then."""
    detokenizer = Tokenizer(byte_fallback()).detokenizer()
    pieces = in_pieces(detokenizer, [259, ord("x") + 3, 0x80 + 3, 262], [1, 1, 1])
    assert "".join(pieces).replace("\ufffd", "?") == "x?a"


@given(st.lists(st.integers(0, 7), max_size=20), sizes)
def test_word_piece_pieces_are_the_whole(token_ids: list[int], cuts: list[int]) -> None:
    detokenizer = Tokenizer(word_piece()).detokenizer()
    assert "".join(in_pieces(detokenizer, token_ids, cuts)) == word_piece().decode(token_ids)


def test_tokens_past_the_vocabulary_have_no_text() -> None:
    """Embeddings are often padded to a round number, and a random model says such tokens."""
    tokenizer = Tokenizer(byte_level())
    a = tokenizer.encode("a", False)
    assert tokenizer.decode([*a, 5000, *a]) == "aa"
