"""What the engine holds does not grow with the number of requests it has served.

https://github.com/waybarrios/vllm-mlx/pull/154: a dictionary of requests was never emptied, and after
some thousands of them memory ran out.
"""

import gc
import sys
from types import FunctionType, ModuleType

import pytest

from disagg.engine.engine import Engine
from support.engines import make_engine, make_request, run_all


def num_objects(root: object) -> int:
    """Objects reachable from `root`, short of code and types."""
    seen = {id(root)}
    pending = [root]
    while pending:
        for thing in gc.get_referents(pending.pop()):
            if id(thing) not in seen and not isinstance(thing, (type, ModuleType, FunctionType)):
                seen.add(id(thing))
                pending.append(thing)
    return len(seen)


def serve(engine: Engine, names: range) -> None:
    """Requests of every kind, ended in every way."""
    for i in names:
        prompt = [i % 10, i % 7, 3, 4, 5, i % 3]
        engine.add(make_request(f"done{i}", prompt, max_tokens=3))
        engine.add(make_request(f"pushed{i}", prompt, max_tokens=3, prefill_only=True))
        engine.add(make_request(f"aborted{i}", prompt, max_tokens=30))
        landed = engine.reserve(make_request(f"landed{i}", prompt, max_tokens=3), True)
        engine.reserve(make_request(f"lost{i}", prompt, max_tokens=3), False)
        engine.add(make_request(f"refused{i}", prompt, max_tokens=-1))
        engine.step()
        engine.abort(f"aborted{i}")
        engine._runner.runner.write(landed.page_ids, prompt, landed.first_missing_page)
        engine.start(f"landed{i}", 2, finished=False)
        engine.unquarantine(engine.quarantine(f"lost{i}"))
        run_all(engine)
        engine.release(f"pushed{i}")
        for end in (engine.abort, engine.release, engine.quarantine):
            end(f"unknown{i}")


@pytest.mark.skipif(sys.implementation.name != "cpython", reason="counts objects by the collector")
def test_hundreds_of_requests_leave_as_much_as_sixty() -> None:
    class NoPlans:
        """A fake runner that remembers no plan."""

        def __init__(self, runner: object) -> None:
            self.runner = runner

        depth = 0

        def launch(self, plan: object) -> object:
            sampled = self.runner.launch(plan)
            self.runner.plans.clear()
            return sampled

    engine = make_engine(num_pages=64, max_num_seqs=8)
    engine._runner = NoPlans(engine._runner)
    serve(engine, range(60))
    before = num_objects(engine._scheduler), num_objects(engine._runner)
    serve(engine, range(60, 360))
    after = num_objects(engine._scheduler), num_objects(engine._runner)
    assert after[0] <= before[0] + 20
    assert after[1] <= before[1] + 20
    stats = engine.stats()
    assert (stats.pages_in_use, stats.running, stats.waiting, stats.reserved, stats.held) == (0,) * 5
    engine.audit()
