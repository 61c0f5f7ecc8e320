"""Every error of ours has one answer."""

import json
from collections.abc import Iterator

import pytest

from disagg import errors
from disagg.frontend import errors as http_errors
from disagg.frontend.errors import error_body, reply_to


def subclasses(kind: type[errors.DisaggError]) -> Iterator[type[errors.DisaggError]]:
    yield kind
    for child in kind.__subclasses__():
        yield from subclasses(child)


@pytest.mark.parametrize("kind", sorted(subclasses(errors.RequestError), key=lambda kind: kind.__name__))
def test_what_the_caller_can_fix_is_a_4xx_with_its_words(kind: type[errors.RequestError]) -> None:
    arguments = {errors.Overloaded: (2.5,), http_errors.MethodNotAllowed: ("GET",)}.get(kind, ())
    reply = reply_to(kind("mind the gap", *arguments), "id-1")  # type: ignore[arg-type]
    assert 400 <= reply.status < 500
    assert json.loads(reply.body)["error"]["message"] == "mind the gap"


@pytest.mark.parametrize(
    "kind",
    [
        *subclasses(errors.WorkerError),
        errors.ConfigError,
        errors.InvariantBroken,
        errors.DisaggError,
        KeyError,
    ],
)
def test_what_is_our_fault_is_a_5xx_that_shows_the_id_alone(kind: type[Exception]) -> None:
    reply = reply_to(kind("page 5 of /dev/shm/x"), "id-1")
    assert reply.status == (503 if issubclass(kind, errors.WorkerError) else 500)
    assert b"page 5" not in reply.body
    assert b"id-1" in reply.body
    assert error_body(kind("page 5"), "id-1") == reply.body


def test_every_4xx_of_the_tree_is_told_apart() -> None:
    """A client branches on `code`; only the base class has none."""
    kinds = [*subclasses(errors.RequestError)]
    codes = [http_errors._kind_of(kind.__new__(kind)).code for kind in kinds]
    assert codes.count(None) == 1
    assert len(set(codes)) == len(codes)
