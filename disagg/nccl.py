"""NCCL by its C interface: the one file that knows its symbols and numbers. Never imports torch.

The library is the one that torch has loaded (or `LD_PRELOAD` has), so there is one NCCL in a process.
Communicators are blocking and all work goes to a stream that the caller names, so it can be captured in
a CUDA graph. torch's own process group cannot serve here: its watchdog ends the process, and it asks of
its store what a `MeetingStore` does not have.
"""

import ctypes
import functools
from collections.abc import Iterator
from contextlib import contextmanager

from disagg.errors import ConfigError, WorkerLost

LIBRARY = "libnccl.so.2"
MULTI_RANK = "NCCL_MULTI_RANK_GPU_ENABLE"
"""Set to 1, NCCL from 2.31 on lets several ranks share one GPU."""
ID_BYTES = 128
TYPES = {"uint8": 1, "int32": 2, "int64": 4, "float16": 6, "float32": 7, "bfloat16": 9}

_UINT8 = TYPES["uint8"]
_SUM = 0
_SUCCESS = 0
_INVALID_USAGE = 5
_IN_PROGRESS = 7


class _UniqueId(ctypes.Structure):
    _fields_ = (("internal", ctypes.c_byte * ID_BYTES),)


_COMM = ctypes.c_void_p
_POINTER = ctypes.c_void_p
_SIGNATURES: dict[str, tuple[type, ...]] = {
    "ncclGetUniqueId": (_POINTER,),
    "ncclCommInitRank": (_POINTER, ctypes.c_int, _UniqueId, ctypes.c_int),
    "ncclCommAbort": (_COMM,),
    "ncclCommGetAsyncError": (_COMM, _POINTER),
    "ncclGroupStart": (),
    "ncclGroupEnd": (),
    "ncclAllReduce": (_POINTER, _POINTER, ctypes.c_size_t, ctypes.c_int, ctypes.c_int, _COMM, _POINTER),
    "ncclBroadcast": (_POINTER, _POINTER, ctypes.c_size_t, ctypes.c_int, ctypes.c_int, _COMM, _POINTER),
    "ncclSend": (_POINTER, ctypes.c_size_t, ctypes.c_int, ctypes.c_int, _COMM, _POINTER),
    "ncclRecv": (_POINTER, ctypes.c_size_t, ctypes.c_int, ctypes.c_int, _COMM, _POINTER),
}


def require() -> None:
    """Raise `ConfigError` where NCCL is missing."""
    _library()


def new_id() -> bytes:
    """Make what the ranks of one communicator must share; it listens for them from now on.

    Raises:
        ConfigError: NCCL is missing.
    """
    unique_id = _UniqueId()
    _check(_library().ncclGetUniqueId(ctypes.byref(unique_id)), "make an id")
    return bytes(unique_id)


class Communicator:
    """One rank's end. One thread uses it, but `abort` may be called from any.

    Addresses are of the device that is current when it is made; streams are raw handles.
    """

    def __init__(self, unique_id: bytes, rank: int, size: int) -> None:
        """Meet the other ranks; waits for them as long as it takes.

        Args:
            unique_id: From `new_id`.
            rank: This one's, from 0.
            size: Ranks in all.

        Raises:
            ConfigError: two ranks have one GPU.
            WorkerLost: a rank went away meanwhile.
        """
        self._nccl = _library()
        self._comm = ctypes.c_void_p()
        shared = _UniqueId.from_buffer_copy(unique_id)
        status = self._nccl.ncclCommInitRank(ctypes.byref(self._comm), size, shared, rank)
        if status == _INVALID_USAGE:
            raise ConfigError(
                f"NCCL refuses rank {rank} of {size}, {_last_error()}; each rank needs a GPU of its own, "
                f"or NCCL 2.31 and {MULTI_RANK}=1"
            )
        _check(status, f"join as rank {rank} of {size}")

    def all_reduce(self, address: int, count: int, type_name: str, stream: int) -> None:
        """Sum over all ranks, in place."""
        status = self._nccl.ncclAllReduce(address, address, count, TYPES[type_name], _SUM, self._comm, stream)
        _check(status, "sum")

    def broadcast(self, address: int, num_bytes: int, root: int, stream: int) -> None:
        """Overwrite every rank's memory with the root's."""
        status = self._nccl.ncclBroadcast(address, address, num_bytes, _UINT8, root, self._comm, stream)
        _check(status, "broadcast")

    def send(self, address: int, num_bytes: int, peer: int, stream: int) -> None:
        """Send to a rank that receives as much."""
        _check(self._nccl.ncclSend(address, num_bytes, _UINT8, peer, self._comm, stream), "send")

    def receive(self, address: int, num_bytes: int, peer: int, stream: int) -> None:
        """Receive from a rank that sends as much."""
        _check(self._nccl.ncclRecv(address, num_bytes, _UINT8, peer, self._comm, stream), "receive")

    @contextmanager
    def group(self) -> Iterator[None]:
        """Have the sends and receives within be one operation, which no order among them can block."""
        _check(self._nccl.ncclGroupStart(), "begin a group")
        try:
            yield
        finally:
            status = self._nccl.ncclGroupEnd()
        _check(status, "end a group")

    def check(self) -> None:
        """Raise `WorkerLost` where another rank is known to be gone."""
        error = ctypes.c_int()
        _check(self._nccl.ncclCommGetAsyncError(self._comm, ctypes.byref(error)), "ask for errors")
        if error.value != _IN_PROGRESS:
            _check(error.value, "go on")

    def abort(self) -> None:
        """End whatever is under way, on the device too, and free everything. Once, and the last call.

        It waits for CUDA graphs that hold operations of this communicator to be destroyed.
        """
        self._nccl.ncclCommAbort(self._comm)


@functools.cache
def _library() -> ctypes.CDLL:
    try:
        library = ctypes.CDLL(LIBRARY)
    except OSError as error:
        raise ConfigError(f"work of several GPUs needs NCCL, which does not load: {error}") from error
    for name, arguments in _SIGNATURES.items():
        function = getattr(library, name)
        function.argtypes, function.restype = arguments, ctypes.c_int
    library.ncclGetErrorString.restype = library.ncclGetLastError.restype = ctypes.c_char_p
    library.ncclGetLastError.argtypes = (_COMM,)
    return library


def _check(status: int, action: str) -> None:
    if status != _SUCCESS:
        words = _library().ncclGetErrorString(status).decode()
        raise WorkerLost(f"NCCL cannot {action}: {words}, {_last_error()}")


def _last_error() -> str:
    words: bytes = _library().ncclGetLastError(None) or b""
    return words.decode(errors="replace").strip() or "no more is known"
