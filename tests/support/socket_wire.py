"""What stands for NCCL without a GPU: a socket between the two ends, which blocks and breaks as NCCL does."""

import contextlib
import ctypes
import os
import socket
import tempfile
import time
import uuid
from pathlib import Path

from disagg.errors import LinkLost
from disagg.transfer.nccl import Runs, Watch

MEET_S = 20.0
MARK = b"\x01"


def new_id() -> bytes:
    """Name a place where the two ends meet."""
    return os.fsencode(Path(tempfile.gettempdir()) / f"wire-{uuid.uuid4().hex}")


class SocketWire:
    """End 0 waits for end 1 at the place that the pair's id names."""

    def __init__(self, pair: bytes, end: int) -> None:
        place = os.fsdecode(pair)
        self._socket = _accept(place) if end == 0 else _connect(place)
        self._socket.settimeout(0.01)

    def send(self, runs: Runs, watch: Watch) -> None:
        for address, length in runs:
            view = memoryview((ctypes.c_char * length).from_address(address)).cast("B")
            while view:
                view = view[self._try(lambda view=view: self._socket.send(view), watch) :]
        self._try(lambda: self._socket.recv(1), watch)

    def receive(self, runs: Runs, watch: Watch) -> None:
        for address, length in runs:
            view = memoryview((ctypes.c_char * length).from_address(address)).cast("B")
            while view:
                view = view[self._try(lambda view=view: self._socket.recv_into(view), watch) :]
        self._try(lambda: self._socket.send(MARK), watch)

    def abort(self) -> None:
        self._socket.close()

    def _try(self, step, watch: Watch):
        while True:
            watch()
            try:
                done = step()
            except TimeoutError:
                continue
            except OSError as error:
                raise LinkLost(str(error)) from error
            if not done:
                raise LinkLost("the other end is gone")
            return done


def _accept(place: str) -> socket.socket:
    with socket.socket(socket.AF_UNIX) as listener:
        listener.settimeout(MEET_S)
        listener.bind(place)
        listener.listen(1)
        try:
            return listener.accept()[0]
        except OSError as error:
            raise LinkLost("the other end did not come") from error
        finally:
            os.unlink(place)


def _connect(place: str) -> socket.socket:
    until = time.monotonic() + MEET_S
    while time.monotonic() < until:
        with contextlib.suppress(FileNotFoundError, ConnectionRefusedError):
            end = socket.socket(socket.AF_UNIX)
            end.connect(place)
            return end
        end.close()
        time.sleep(0.001)
    raise LinkLost("the other end did not come")
