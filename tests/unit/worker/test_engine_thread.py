"""The thread that owns the service: order, idleness, its end."""

import queue
import threading

from disagg.protocol import Renew
from disagg.worker.engine_thread import EngineThread
from disagg.worker.outbox import Outbox, ToRouters


class Service:
    """Steps as often as it was told to, and notes who called it."""

    def __init__(self) -> None:
        self.outbox = Outbox()
        self.steps = 0
        self.log: list[str] = []
        self.threads: set[int] = set()

    @property
    def has_work(self) -> bool:
        return self.steps > 0

    def report_changes(self) -> None:
        if self.has_work:
            self.outbox.put(ToRouters(Renew(-1.0)))  # type: ignore[arg-type]

    def step(self) -> bool:
        self.threads.add(threading.get_ident())
        self.steps -= 1
        self.log.append("step")
        self.outbox.put(ToRouters(Renew(float(self.steps))))  # type: ignore[arg-type]
        return True

    def note(self, word: str) -> None:
        self.threads.add(threading.get_ident())
        self.log.append(word)


class Harness:
    def __init__(self, fail: Exception | None = None) -> None:
        self.service = Service()
        self.fail = fail
        self.delivered: queue.SimpleQueue[object] = queue.SimpleQueue()
        self.crashed: queue.SimpleQueue[Exception] = queue.SimpleQueue()
        self.ready = threading.Event()
        self.thread = EngineThread(
            self.make,
            on_ready=self.ready.set,
            deliver=self.delivered.put,
            on_crash=self.crashed.put,
        )

    def make(self) -> Service:
        if self.fail is not None:
            raise self.fail
        return self.service


def test_work_is_done_in_order_by_one_thread_between_steps() -> None:
    h = Harness()
    gate = threading.Event()

    def begin(service: Service) -> None:
        gate.wait()
        service.steps = 3
        service.note("begun")

    h.thread.post(begin)
    h.thread.post(lambda s: s.note("a"))
    h.thread.start()
    h.ready.wait(5)
    h.thread.post(lambda s: s.note("b"))
    gate.set()
    for _ in range(3):
        h.delivered.get(timeout=5)
    assert h.thread.stop(5)
    assert h.service.log == ["begun", "a", "b", "step", "step", "step"]
    assert h.service.threads == {h.thread._thread.ident}


def test_answers_do_not_wait_for_the_step() -> None:
    """A Reserved must be sent before the chunk that happens to run next, not after it."""
    h = Harness()
    in_step, go_on = threading.Event(), threading.Event()

    def slow_step() -> bool:
        in_step.set()
        go_on.wait(5)
        h.service.steps = 0
        return True

    h.service.step = slow_step  # type: ignore[method-assign]

    def ask(service: Service) -> None:
        service.steps = 1
        service.outbox.put(ToRouters(Renew(7.0)))  # type: ignore[arg-type]

    h.thread.start()
    h.thread.post(ask)
    in_step.wait(5)
    # Nor does the news of what the step begins with: `report_changes` tells -1.
    assert h.delivered.get(timeout=5) == [ToRouters(Renew(7.0)), ToRouters(Renew(-1.0))]  # type: ignore[arg-type]
    go_on.set()
    assert h.thread.stop(5)


def test_what_is_posted_last_comes_behind_what_arrived_during_a_step() -> None:
    """A tick that expires leases must not overtake the Renew that waits behind it."""
    h = Harness()
    go_on = threading.Event()
    h.thread.start()
    h.thread.post(lambda s: go_on.wait(5))
    h.thread.post_last(lambda s: s.note("tick"))
    h.thread.post(lambda s: s.note("renew"))
    go_on.set()
    done = threading.Event()
    h.thread.post_last(lambda s: done.set())
    assert done.wait(5)
    assert h.thread.stop(5)
    assert h.service.log == ["renew", "tick"]


def test_a_step_that_had_nothing_to_do_waits_for_something_to_arrive() -> None:
    """A prompt that lacks pages, with nothing else to run, must not burn the core that pushes them."""
    h = Harness()
    stepped: queue.SimpleQueue[None] = queue.SimpleQueue()

    def stuck_step() -> bool:
        h.service.note("step")
        stepped.put(None)
        return False

    def begin(service: Service) -> None:
        service.steps = 1

    h.service.step = stuck_step  # type: ignore[method-assign]
    h.thread.start()
    h.thread.post(begin)
    stepped.get(timeout=5)
    h.thread.post(lambda s: s.note("pages"))
    stepped.get(timeout=5)
    assert h.thread.stop(5)
    assert h.service.log == ["step", "pages", "step"]


def test_what_was_posted_before_the_end_is_still_done_and_delivered() -> None:
    h = Harness()
    h.thread.start()
    h.thread.post(lambda s: s.outbox.put(ToRouters(Renew(1.0))))  # type: ignore[arg-type]
    assert h.thread.stop(5)
    assert h.delivered.get_nowait() == [ToRouters(Renew(1.0))]  # type: ignore[arg-type]


def test_a_failed_start_and_a_bug_are_told_once() -> None:
    failed = Harness(fail=ValueError("no model"))
    failed.thread.start()
    assert str(failed.crashed.get(timeout=5)) == "no model"
    assert not failed.ready.is_set()
    broken = Harness()
    broken.thread.start()
    broken.thread.post(lambda s: 1 / 0)
    assert isinstance(broken.crashed.get(timeout=5), ZeroDivisionError)
    assert broken.thread.stop(5)


def test_the_end_does_not_wait_for_ever() -> None:
    h = Harness()
    go_on = threading.Event()
    h.thread.start()
    h.thread.post(lambda s: go_on.wait(5))
    assert not h.thread.stop(0.01)
    go_on.set()
    h.thread._thread.join(5)
