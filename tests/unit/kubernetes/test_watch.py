"""Following slices: lists, events, versions that are too old, and an API server that is away."""

from collections.abc import Iterator
from typing import Any

import msgspec
import pytest

from disagg.kubernetes.slices import EndpointSlice
from disagg.kubernetes.watch import (
    BACKOFF_MAX_S,
    ApiError,
    Bookmark,
    Changed,
    Event,
    Expired,
    Listed,
    Metadata,
    Removed,
    Watch,
    backoff_s,
)
from support.api_server import make_slice
from support.clock import FakeClock


def part(name: str, version: int, port: int = 5600) -> EndpointSlice:
    raw = make_slice(name, [], port=port)
    raw["metadata"]["resourceVersion"] = str(version)
    return msgspec.convert(raw, EndpointSlice)


def listed(version: int, *parts: EndpointSlice) -> Listed[EndpointSlice]:
    return Listed("EndpointSliceList", Metadata(resource_version=str(version)), list(parts))


AWAY = ApiError("connection refused")
Changes = list[Event[EndpointSlice] | ApiError]
Script = list[Listed[EndpointSlice] | ApiError | Changes]


class Played:
    """A watch over an API that answers by a script: lists and watches in order, then it is time to stop."""

    def __init__(self, script: Script, watch_s: float = 30.0) -> None:
        self.script = script
        self.watch_s = watch_s
        self.clock = FakeClock()
        self.asked: list[str] = []
        self.waits: list[float] = []
        self.told: list[list[str]] = []
        self.gone: list[str] = []
        Watch(self, self._tell, wait=self._wait, clock=self.clock, jitter=lambda: 1.0).run()

    def _wait(self, seconds: float) -> bool:
        if not self.script:
            return True
        self.waits.append(seconds)
        self.clock.advance(seconds)
        return False

    def _tell(self, slices: list[EndpointSlice], removed: EndpointSlice | None) -> None:
        if removed is not None:
            self.gone.append(f"{removed.metadata.name}@{removed.metadata.resource_version}")
        self.told.append(sorted(f"{s.metadata.name}@{s.metadata.resource_version}" for s in slices))

    def _next(self, kind: type[Any]) -> Any:
        answer = self.script.pop(0)
        if isinstance(answer, ApiError):
            raise answer
        assert isinstance(answer, kind), f"asked for {kind}, the script has {answer}"
        return answer

    def list(self) -> Listed[EndpointSlice]:
        self.asked.append("list")
        answer: Listed[EndpointSlice] = self._next(Listed)
        return answer

    def watch(self, version: str) -> Iterator[Event[EndpointSlice]]:
        self.asked.append(version)
        for event in self._next(list):
            if isinstance(event, ApiError):
                raise event
            yield event
        self.clock.advance(self.watch_s)


def test_what_changes_is_told_and_the_watch_goes_on_from_the_last_version() -> None:
    changes: Changes = [Changed(part("b", 6)), Changed(part("a", 7)), Removed(part("b", 8))]
    played = Played([listed(5, part("a", 1)), changes, []])
    assert played.told == [["a@1"], ["a@1", "b@6"], ["a@7", "b@6"], ["a@7"]]
    assert played.gone == ["b@8"], "its last state is told with the change, once"
    assert played.asked == ["list", "5", "8"]
    assert played.waits == [0.0, 0.0]


def test_a_bookmark_moves_the_version_and_changes_nothing() -> None:
    """Without it a quiet release would fall so far behind that each watch began with a list."""
    played = Played([listed(5, part("a", 1)), [Bookmark("90")], []])
    assert played.asked == ["list", "5", "90"]
    assert len(played.told) == 1


def test_a_version_that_is_too_old_is_answered_by_a_list() -> None:
    """What happened in between is found by comparing: `b` went, `c` came."""
    played = Played(
        [listed(5, part("a", 1), part("b", 2)), [Expired()], listed(50, part("a", 1), part("c", 40)), []]
    )
    assert played.asked == ["list", "5", "list", "50"]
    assert played.told == [["a@1", "b@2"], ["a@1", "c@40"]]


def test_versions_that_are_always_too_old_do_not_make_a_storm_of_lists() -> None:
    script: Script = []
    for _ in range(6):
        script += [listed(5), [Expired()]]
    played = Played(script)
    assert played.waits == [0.0, 0.5, 1.0, 2.0, 4.0, 8.0]


def test_an_api_server_that_is_away_changes_nothing() -> None:
    """For as long as it takes; then the watch goes on from where it was, without a list."""
    away: Script = [AWAY] * 30
    played = Played([listed(5, part("a", 1)), [Changed(part("b", 6))], *away, [Changed(part("a", 9))]])
    assert played.told == [["a@1"], ["a@1", "b@6"], ["a@9", "b@6"]]
    assert played.asked == ["list", "5", *["6"] * 31]
    assert sum(played.waits) > 300


def test_a_failed_list_is_no_empty_list() -> None:
    """A 410 while the API server is on its way down: the members stay until a whole list is here."""
    played = Played([listed(5, part("a", 1)), [Expired()], AWAY, AWAY, listed(9, part("a", 1)), []])
    assert played.told == [["a@1"], ["a@1"]]
    assert played.asked == ["list", "5", "list", "list", "list", "9"]


def test_a_watch_that_breaks_loses_nothing_of_what_it_told() -> None:
    played = Played([listed(5), [Changed(part("a", 6)), AWAY], []])
    assert played.asked == ["list", "5", "6"]
    assert played.told == [[], ["a@6"]]
    assert played.waits == [0.0, 0.5]


def test_waits_grow_to_a_bound_and_start_over_after_an_answer() -> None:
    away: Script = [AWAY] * 8
    played = Played([listed(5), [], *away, [], AWAY, []])
    assert played.waits == [0.0, 0.0, 0.5, 1.0, 2.0, 4.0, 8.0, 15.0, 15.0, 15.0, 0.0, 0.5]


def test_a_watch_that_ends_at_once_is_not_opened_again_at_once() -> None:
    """A proxy that closes every stream would else be asked as fast as the network allows."""
    quiet: Script = [[] for _ in range(4)]
    played = Played([listed(5), *quiet], watch_s=0.0)
    assert played.waits == [0.0, 0.5, 1.0, 2.0]


@pytest.mark.parametrize("failures", [1, 5, 1000, 10**6])
def test_jitter_takes_away_up_to_half(failures: int) -> None:
    longest = backoff_s(failures, 1.0)
    assert longest <= BACKOFF_MAX_S
    assert backoff_s(failures, 0.0) == longest / 2
