"""The thread that owns engine, KV cache and leases. Nobody else touches them.

Others hand it work, which it does between two steps; it hands over what is to be sent. Idle it
waits for work and costs nothing.
"""

import queue
import threading
from collections.abc import Callable

from disagg.worker.outbox import Batch
from disagg.worker.service import WorkerService

Work = Callable[[WorkerService], None]


class EngineThread:
    """Makes a service and runs it until stopped."""

    def __init__(
        self,
        make_service: Callable[[], WorkerService],
        *,
        on_ready: Callable[[], None],
        deliver: Callable[[Batch], None],
        on_crash: Callable[[Exception], None],
    ) -> None:
        """Prepare; nothing runs before `start`. All callbacks are called from the new thread.

        Args:
            make_service: Loads the model, which takes a while.
            on_ready: The service is there and takes work.
            deliver: Takes what the service wants sent, in order.
            on_crash: Told once why the thread ended by itself: a wrong configuration or a bug.
        """
        self._make_service = make_service
        self._on_ready = on_ready
        self._deliver = deliver
        self._on_crash = on_crash
        self._inbox: queue.SimpleQueue[Work | None] = queue.SimpleQueue()
        # A daemon: a step that waits for a dead rank must not keep the process from ending.
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)

    def start(self) -> None:
        """Begin to make the service."""
        self._thread.start()

    def post(self, work: Work) -> None:
        """Have something done between two steps; from any thread, in order."""
        self._inbox.put(work)

    def post_last(self, work: Work) -> None:
        """Have something done behind all that will have been posted when a step now under way ends."""
        self.post(lambda service: self.post(work))

    def stop(self, timeout_s: float | None = None) -> bool:
        """End after the work posted so far; False where a step takes longer than that."""
        self._inbox.put(None)
        self._thread.join(timeout_s)
        return not self._thread.is_alive()

    def _run(self) -> None:
        try:
            service = self._make_service()
            self._on_ready()
            self._work(service)
        except Exception as error:
            # The edge of this thread: without it the worker would be up and do nothing.
            self._on_crash(error)

    def _work(self, service: WorkerService) -> None:
        is_stuck = False
        while True:
            is_stopping = not self._take_work(service, wait=is_stuck or not service.has_work)
            # Before the step: answers must not wait for it.
            service.report_changes()
            self._flush(service)
            if is_stopping:
                return
            # What waits for pages gets them by what is posted: without that, another step would do no more.
            is_stuck = service.has_work and not service.step()
            self._flush(service)

    def _take_work(self, service: WorkerService, wait: bool) -> bool:
        """Do all that has been posted, with `wait` at least one thing; False at the end."""
        try:
            work = self._inbox.get(block=wait)
            while work is not None:
                work(service)
                work = self._inbox.get_nowait()
        except queue.Empty:
            return True
        return False

    def _flush(self, service: WorkerService) -> None:
        batch = service.outbox.take()
        if batch:
            self._deliver(batch)
