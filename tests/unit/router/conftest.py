from collections.abc import Callable, Iterator
from typing import Any

import pytest

from support.router import Harness


@pytest.fixture
def make_router() -> Iterator[Callable[..., Harness]]:
    """Routers without workers; whatever a test did, its clients leave and nothing may be left."""
    made: list[Harness] = []

    def make(**options: Any) -> Harness:
        made.append(Harness(**options))
        return made[-1]

    yield make
    try:
        for harness in made:
            for client in harness.clients:
                client.leave()
            harness.assert_nothing_left()
    finally:
        for harness in made:
            harness.runner.close()


@pytest.fixture
def router(make_router: Callable[..., Harness]) -> Harness:
    """One of them."""
    return make_router()
