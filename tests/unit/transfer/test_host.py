import os
import subprocess
import sys
from pathlib import Path

from disagg.transfer.host import host_id, is_process_gone, process_start_time
from support.system import eventually


def test_living_process_is_not_gone() -> None:
    start_time = process_start_time(os.getpid())
    assert start_time is not None
    assert not is_process_gone(os.getpid(), start_time)


def test_ended_process_is_gone_even_before_it_is_reaped() -> None:
    """A zombie writes nothing, and its parent may never wait for it."""
    child = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    start_time = process_start_time(child.pid)
    assert start_time is not None
    child.kill()
    os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)
    assert Path(f"/proc/{child.pid}").exists()
    assert is_process_gone(child.pid, start_time)
    child.communicate()
    assert is_process_gone(child.pid, start_time)


def test_process_whose_first_thread_alone_has_ended_is_not_gone() -> None:
    """It looks like a zombie, and its other threads, a GPU's channels among what they hold, write on."""
    code = (
        "import ctypes, threading, time\n"
        "threading.Thread(target=time.sleep, args=(60,)).start()\n"
        "ctypes.CDLL(None).pthread_exit(None)"
    )
    child = subprocess.Popen([sys.executable, "-c", code])
    try:
        eventually(lambda: ") Z " in Path(f"/proc/{child.pid}/stat").read_text(), "the end of a thread")
        start_time = process_start_time(child.pid)
        assert start_time is not None
        assert not is_process_gone(child.pid, start_time)
    finally:
        child.kill()
        child.wait()


def test_another_process_under_the_same_pid_is_not_the_one_meant() -> None:
    """Pids are reused; start times under one pid are not."""
    start_time = process_start_time(os.getpid())
    assert start_time is not None
    assert is_process_gone(os.getpid(), start_time - 1)


def test_host_id_is_the_same_in_another_process_here() -> None:
    code = "from disagg.transfer.host import host_id; print(host_id())"
    other = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert other.stdout.strip() == host_id()
    assert len(host_id()) > 36
