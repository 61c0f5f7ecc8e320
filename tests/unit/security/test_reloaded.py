"""What contents of files do to the value made of them; the files' own tests are those of their owners."""

import pytest

from disagg.security.reloaded import Reloaded
from support.clock import FakeClock


def test_a_failure_that_was_not_the_contents_is_tried_again(caplog: pytest.LogCaptureFixture) -> None:
    """A pair of files may be caught halfway through its replacement."""
    clock, contents, failures, changes = FakeClock(), ["one"], list[str](), list[str]()

    def make(content: str) -> str:
        if failures:
            raise OSError(failures.pop())
        return content.upper()

    value = Reloaded("it", lambda: contents[0], make, on_change=changes.append, clock=clock)
    contents[0], failures[:] = "two", ["halfway"]
    clock.advance(1.0)
    assert value.get() == "ONE"
    clock.advance(1.0)
    assert value.get() == "TWO"
    assert changes == ["TWO"]
    assert len(caplog.messages) == 1
