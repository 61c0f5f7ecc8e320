"""Which containers' ends are told to people, and in which words."""

from typing import Any

import msgspec
import pytest

from disagg.kubernetes.pods import Pod
from disagg.kubernetes.refusals import MAX_CHARS, Refusals, refusals_of
from support.api_server import make_container_end, make_pod

SENTENCE = "disagg: tensor_parallel_size 2 does not divide 9 heads"


def pod(now: dict[str, Any], before: dict[str, Any] | None = None, name: str = "p") -> Pod:
    raw = make_pod(name)
    raw["status"]["containerStatuses"] = [{"name": "worker", "state": now, "lastState": before or {}}]
    return msgspec.convert(raw, Pod)


def sentences(*args: Any) -> list[str]:
    return [refusal.sentence for refusal in refusals_of(pod(*args))]


def test_the_last_line_of_a_wrong_configuration_is_told() -> None:
    """The kubelet takes the end of the log, which libraries may have written to as well."""
    assert sentences(make_container_end(2, f"a library warns\n{SENTENCE}\n")) == [SENTENCE]


def test_it_is_told_while_the_next_container_waits_or_runs() -> None:
    """Events are merged: the moment between an end and the next start may never be seen."""
    for now in ({"waiting": {"reason": "CrashLoopBackOff"}}, {"running": {}}, {}):
        assert sentences(now, make_container_end(2, SENTENCE)) == [SENTENCE]


@pytest.mark.parametrize(
    ("exit_code", "message"), [(0, SENTENCE), (1, SENTENCE), (137, SENTENCE), (2, " \n")]
)
def test_other_ends_are_not(exit_code: int, message: str) -> None:
    """The end of a log is no sentence, and may hold what is nobody else's business."""
    assert sentences(make_container_end(exit_code, message)) == []


def test_a_sentence_is_cut_where_the_api_server_would_refuse_it() -> None:
    assert len(sentences(make_container_end(2, "x" * 2000))[0]) == MAX_CHARS


def test_the_event_is_of_the_container_and_has_its_name() -> None:
    """Every router that makes it makes the same; a container that ends so again is another."""
    (refusal,) = refusals_of(pod(make_container_end(2, SENTENCE, "containerd://" + "a" * 16 + "b" * 48)))
    event = refusal.to_event("team")
    assert event["metadata"] == {"name": "p." + "a" * 16, "namespace": "team"}
    assert event["involvedObject"]["uid"] == "uid-p"
    assert event["involvedObject"]["fieldPath"] == "spec.containers{worker}"
    assert (event["type"], event["message"]) == ("Warning", SENTENCE)
    assert event["lastTimestamp"] == "2026-01-01T00:00:00Z"


def test_an_end_is_told_once() -> None:
    refusals = Refusals()
    first, second = make_container_end(2, SENTENCE, "c://1"), make_container_end(2, SENTENCE, "c://2")

    def told(*pods: Pod) -> set[str]:
        return {f"{refusal.pod} {refusal.container_id}" for refusal in refusals.take(pods)}

    assert told(pod(first)) == {"p c://1"}
    assert told(pod({"waiting": {}}, first), pod({}, name="other")) == set()
    assert told(pod(second, first), pod(first, name="other")) == {"p c://2", "other c://1"}
    assert told() == set()
