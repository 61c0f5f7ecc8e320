"""Encodings of every message, kept as bytes: an old peer must still be understood.

After adding a field (last, with a default), append the new encoding to `encodings.json`; never
change an old one. `python tests/unit/protocol/test_codec.py` prints the encodings of today.
"""

import json
from pathlib import Path
from typing import Any, get_args

import msgspec
import pytest

from disagg import protocol as p
from disagg.protocol import FromPeer, FromWorker, SamplingParams, ToWorker, decoder, encode

LAYOUT = p.KvLayout(16, 3, 30, 64, "bfloat16", 1)
SAMPLING = SamplingParams(max_tokens=8, seed=2**64 - 1, stop_token_ids=(2,))
ENDPOINT = p.RankEndpoint(0, "agent", b"meta", 2**47, 64, 368640, "DRAM", 0)
TARGET = p.Target("decode-0", "uuid", "ipc:///x", 1, [4, 5])
EXAMPLES: list[msgspec.Struct] = [
    p.Hello(1, "router", 30.0),
    p.Welcome(
        1,
        "d",
        "u",
        "decode",
        "ready",
        "m",
        1,
        [1],
        "http://x",
        "ipc:///x",
        8192,
        64,
        1024,
        9,
        LAYOUT,
        [2],
        "bfloat16",
        "nixl",
    ),
    p.Reserve("t", 1, 30.0, [1, 2], 2, SAMPLING, "salt", True),
    p.Reserved("t", 1, 1, [3, 4], 16),
    p.Rejected("t", 1, "no_pages", "why"),
    p.Prefill("t", 1, 30.0, 60.0, [1], 1, SAMPLING, TARGET),
    p.Generate("t", 1, 30.0, [1], 1, SAMPLING),
    p.Abort("t", 1),
    p.Release("t", 1),
    p.Fenced("t", 1),
    p.Renew(30.0),
    p.SnapshotRequest(),
    p.Goodbye("bye"),
    p.Accepted("t", 1, 0),
    p.FirstToken("t", 1, 0, 7, None, 16, 0.5, 0.25),
    p.PrefillDone("t", 1, 2, 737280, 0.5, "nixl"),
    p.KvReceived("t", 1, 2, 737280, 737280, 0.5, "nixl"),
    p.Failed("t", 1, "why", True),
    p.Tokens([p.SequenceTokens("t", 1, 1, [5, 6], "stop", 16)]),
    p.Load("ready", 1, 2, 3, 4, 5, 6, 7, 8, 0.5, 0.25),
    p.SummaryDelta(1, 2, b"\x01" * 8, b""),
    p.SummarySnapshot(1, 2, b"\x01" * 8, True),
    p.SummaryDigest(1, 2, 1, 2**64 - 1),
    p.PeerHello(1, "p", "u", LAYOUT, [ENDPOINT], "host", [(1, 2)]),
    p.PeerFence("t", 1),
    p.PeerFenced("t", 1),
    p.PeerBye("why"),
    p.AskRecord("r"),
    p.RecordAnswer("r", b"{}"),
    p.PushDone("t", 1, 0, 0, 368640, 7, 0, False),
]
KEPT: dict[str, list[str]] = json.loads((Path(__file__).parent / "encodings.json").read_text())


def union_of(message: msgspec.Struct) -> Any:
    kinds = (ToWorker, FromWorker, FromPeer)
    return next((kind for kind in kinds if type(message) in get_args(kind)), type(message))


@pytest.mark.parametrize("message", EXAMPLES, ids=lambda message: type(message).__name__)
def test_every_kept_encoding_is_still_understood(message: msgspec.Struct) -> None:
    kept = KEPT[type(message).__name__]
    assert encode(message).hex() == kept[-1], "a changed encoding needs a new entry, and old peers"
    for old in kept:
        assert decoder(union_of(message)).decode(bytes.fromhex(old)) == message


def test_every_message_has_an_example() -> None:
    named = {type(message) for message in EXAMPLES}
    assert {*get_args(ToWorker), *get_args(FromWorker), *get_args(FromPeer)} <= named


@pytest.mark.parametrize("junk", [b"", b"\xc1", b"\x91\xa5hello", b"\x94\xa5hello\x01\x02\x03", b"\x80"])
def test_anything_else_is_refused(junk: bytes) -> None:
    """An endpoint drops and counts these; they must not arrive as something else."""
    with pytest.raises(msgspec.MsgspecError):
        decoder(ToWorker).decode(junk)


def test_sampling_names_the_field_that_is_out_of_range() -> None:
    from disagg.errors import InvalidRequest

    for field, value in (("max_tokens", -3), ("top_p", 0.0), ("temperature", float("nan")), ("min_p", 2.0)):
        with pytest.raises(InvalidRequest, match=field) as caught:
            msgspec.structs.replace(SAMPLING, **{field: value}).check()
        assert caught.value.param == field


if __name__ == "__main__":
    print(json.dumps({type(m).__name__: [encode(m).hex()] for m in EXAMPLES}, indent=1))
