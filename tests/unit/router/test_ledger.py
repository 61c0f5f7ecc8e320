import pytest

from disagg.router.ledger import (
    CachedTokens,
    KvRecord,
    Ledger,
    Phases,
    RequestRecord,
    SequenceRecord,
)


def record(request_id: str, *sequences: SequenceRecord) -> RequestRecord:
    return RequestRecord(request_id, None, 1.0, list(sequences) or [SequenceRecord(0, 5)])


def ended(index: int, **changes: object) -> SequenceRecord:
    sequence = SequenceRecord(index, 5, finish_reason="stop", release="finished", attempts=1)
    for name, value in changes.items():
        setattr(sequence, name, value)
    return sequence


def test_it_is_bounded_and_newest_first() -> None:
    ledger = Ledger(2)
    for name in "abc":
        ledger.add(record(name))
    assert len(ledger) == 2
    assert [r.request_id for r in ledger.newest(10)] == ["c", "b"]
    assert [r.request_id for r in ledger.newest(1)] == ["c"]
    assert ledger.newest(0) == []
    assert ledger.get("a") is None


def test_the_body_has_the_fields_that_others_lean_on() -> None:
    body = record("a").to_dict()
    assert set(body) >= {
        "request_id",
        "client_request_id",
        "decision",
        "reason",
        "prefill_worker",
        "decode_worker",
        "prompt_tokens",
        "completion_tokens",
        "cached_tokens",
        "predicted",
        "kv",
        "attempts",
        "phases",
        "finish_reason",
        "release",
    }
    assert set(body["kv"]) == {"pages", "bytes_expected", "bytes_received", "transport", "seconds"}
    assert "sequences" not in body
    assert "error" not in body


def test_several_sequences_are_summed_above_and_shown_inside() -> None:
    first = ended(
        0,
        decision="disaggregated",
        completion_tokens=3,
        cached_tokens=CachedTokens(16, 0),
        kv=KvRecord(2, 200, 200, "nixl", 0.5),
        phases=Phases(ttft_s=0.2, total_s=1.0),
    )
    second = ended(
        1,
        decision="local",
        finish_reason="length",
        completion_tokens=4,
        kv=KvRecord(),
        phases=Phases(ttft_s=0.1, total_s=2.0),
    )
    body = record("a", first, second).to_dict()
    assert (body["prompt_tokens"], body["completion_tokens"], body["attempts"]) == (10, 7, 1)
    assert body["kv"] == {
        "pages": 2,
        "bytes_expected": 200,
        "bytes_received": 200,
        "transport": "nixl",
        "seconds": 0.5,
    }
    assert (body["decision"], body["finish_reason"], body["release"]) == (
        "disaggregated",
        "length",
        "finished",
    )
    assert (body["phases"]["ttft_s"], body["phases"]["total_s"]) == (0.1, 2.0)
    assert [s["index"] for s in body["sequences"]] == [0, 1]


def test_a_request_has_ended_when_all_of_it_has() -> None:
    running = record("a", ended(0), SequenceRecord(1, 5))
    assert not running.is_ended
    assert (running.to_dict()["finish_reason"], running.to_dict()["release"]) == (None, None)


@pytest.mark.parametrize(
    ("reasons", "worst"),
    [
        (["stop", "length"], "length"),
        (["stop", "abort"], "abort"),
        (["abort", "error"], "error"),
        (["stop", "stop"], "stop"),
    ],
)
def test_the_worst_end_speaks_for_the_request(reasons: list[str], worst: str) -> None:
    sequences = [ended(i, finish_reason=reason) for i, reason in enumerate(reasons)]
    assert record("a", *sequences).to_dict()["finish_reason"] == worst
