"""Stop strings, however the text is cut."""

import time

from hypothesis import example, given, settings
from hypothesis import strategies as st

from disagg.frontend.stops import StopMatcher, StopString


def matcher(*stops: str) -> StopMatcher:
    return StopMatcher(tuple(StopString.of(stop) for stop in stops))


def expected(text: str, stops: list[str]) -> tuple[str, bool]:
    """The rule, slowly: of all matches the one that ends first, of those the longest."""
    ends = [(text.find(stop) + len(stop), -len(stop)) for stop in stops if stop in text]
    if not ends:
        return text, False
    end, minus_length = min(ends)
    return text[: end + minus_length], True


def run(matcher: StopMatcher, pieces: list[str]) -> tuple[str, bool]:
    sent = ""
    for piece in pieces:
        text, found = matcher.push(piece)
        sent += text
        if found:
            return sent, True
    return sent + matcher.flush(), False


letters = st.text("ab", max_size=6)


stop_strings = st.text("ab", min_size=1, max_size=8)


@settings(max_examples=500, deadline=None)
@example(["ab"], ["ab", "b"])
@example(["aabaaabaaaa"], ["aabaaaa"])
@given(st.lists(letters, max_size=12), st.lists(stop_strings, min_size=1, max_size=4))
def test_the_cut_does_not_matter(pieces: list[str], stops: list[str]) -> None:
    """Two letters only, so that stop strings overlap themselves and each other all the time."""
    assert run(matcher(*stops), pieces) == expected("".join(pieces), stops)


@given(st.lists(letters, max_size=12), st.text("ab", min_size=1, max_size=5))
def test_only_what_may_become_a_stop_string_is_held_back(pieces: list[str], stop: str) -> None:
    """A client sees text as early as it can be certain."""
    machine = matcher(stop)
    sent = taken = ""
    for piece in pieces:
        text, found = machine.push(piece)
        taken += piece
        sent += text
        if found:
            return
        held = taken[len(sent) :]
        assert sent + held == taken
        possible = [size for size in range(1, len(stop)) if taken.endswith(stop[:size])]
        assert len(held) == max(possible, default=0)


def test_a_stop_string_that_nearly_repeats_itself_costs_linear_time() -> None:
    """A naive search takes minutes for this, on the loop that serves everybody."""
    machine = matcher(*(["a" * 1000 + "b"] * 4))
    began = time.process_time()
    for _ in range(100):
        machine.push("a" * 1000)
    assert time.process_time() - began < 2.0
