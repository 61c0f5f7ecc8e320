"""The thread that owns a rank's transport: commands in by one queue, events out by one callback.

Idle it blocks on the queue and costs nothing; while KV is awaited it polls twice a millisecond;
while writes are open it polls without pause for the first moment, then with tiny pauses, so that
it never starves the engine's threads of a core for a whole transfer.
"""

import logging
import queue
import threading
import time
from collections.abc import Callable

from disagg.errors import WorkerError
from disagg.protocol import KvLayout, RankEndpoint
from disagg.transfer.base import Transport
from disagg.transfer.mover import Command, Event, KvMover

SPIN_S = 0.001
"""Poll without pause for this long after the last command or event."""
PAUSE_S = 0.00005
"""Between polls of open writes after that."""

log = logging.getLogger(__name__)


class _Stop:
    """Ends the thread."""


class TransferThread:
    """Runs one rank's `KvMover`. `submit` is called from any thread, `on_event` from this one."""

    def __init__(
        self,
        make_transport: Callable[[], Transport],
        layout: KvLayout,
        rank: int,
        on_event: Callable[[Event], None],
        on_crash: Callable[[Exception], None],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Prepare; nothing runs before `start`.

        Args:
            make_transport: Called in the new thread, which alone uses what it returns.
            layout: This worker's KV layout; `rank` is whose share the transport's pool holds.
            rank: This process's tensor-parallel rank.
            on_event: Takes each event in order; must return at once.
            on_crash: Told once when the thread dies of a bug; the process should end.
            clock: Monotonic; deadlines of commands are its instants.
        """
        self._make_transport = make_transport
        self._layout = layout
        self._rank = rank
        self._on_event = on_event
        self._on_crash = on_crash
        self._clock = clock
        self._commands: queue.SimpleQueue[Command | _Stop] = queue.SimpleQueue()
        self._started: queue.SimpleQueue[RankEndpoint | Exception] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._run, name=f"kv-transfer-{rank}", daemon=True)
        self.num_malformed = 0
        """Notifications dropped so far; read from any thread."""
        self.num_poll_errors = 0
        """Polls in which the transport itself failed; read from any thread."""

    def start(self) -> RankEndpoint:
        """Make the transport and begin. Raises what making it raised."""
        self._thread.start()
        outcome = self._started.get()
        if isinstance(outcome, Exception):
            self._thread.join()
            raise outcome
        return outcome

    def submit(self, command: Command) -> None:
        """Hand over a command; from any thread, in order."""
        self._commands.put(command)

    def stop(self) -> None:
        """End the thread and close the transport. Open writes are given up; idempotent.

        From any thread but this one. What was submitted before is still done.
        """
        self._commands.put(_Stop())
        if self._thread.ident is not None:
            self._thread.join()

    def _run(self) -> None:
        try:
            transport = self._make_transport()
            endpoint = transport.endpoint()
        except Exception as error:
            self._started.put(error)
            return
        self._started.put(endpoint)
        try:
            self._work(transport, KvMover(transport, self._layout, self._rank, self._clock))
        except Exception as error:
            # The edge of this thread: without it the worker would wait for KV for ever.
            log.exception("the transfer thread of rank %d died", self._rank)
            self._on_crash(error)
        finally:
            self._close(transport)

    def _close(self, transport: Transport) -> None:
        try:
            transport.close()
        except WorkerError:
            # The process is about to end, and with it whatever could not be given back.
            log.warning("the transport of rank %d did not close cleanly", self._rank, exc_info=True)

    def _work(self, transport: Transport, mover: KvMover) -> None:
        busy_until = 0.0
        while True:
            command = self._next_command(mover.wait_s(), busy_until)
            if isinstance(command, _Stop):
                return
            events = [] if command is None else mover.on_command(command)
            events += mover.poll()
            self.num_malformed = mover.num_malformed
            self.num_poll_errors = mover.num_poll_errors
            if events or command is not None:
                busy_until = time.monotonic() + SPIN_S
            for event in events:
                self._on_event(event)

    def _next_command(self, wait_s: float | None, busy_until: float) -> Command | _Stop | None:
        if wait_s == 0.0:
            if time.monotonic() < busy_until:
                return self._poll_command()
            wait_s = PAUSE_S
        try:
            return self._commands.get(timeout=wait_s)
        except queue.Empty:
            return None

    def _poll_command(self) -> Command | _Stop | None:
        try:
            return self._commands.get_nowait()
        except queue.Empty:
            return None
