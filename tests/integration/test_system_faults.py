"""Deaths, disconnects, signals and idleness of a whole system."""

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import openai
import psutil
import pytest

from support.system import DEFAULT_MODEL, System, eventually, running

LONG = "The lighthouse keeper wrote in his log that the sea had been calm for nine days. "


@pytest.fixture(scope="module")
def system(tmp_path_factory: pytest.TempPathFactory) -> Iterator[System]:
    """Two workers of each role, so that each death leaves one."""
    flags = ["--prefill", "2", "--decode", "2", "--dtype", "float32", "--num-threads", "1"]
    with running(*flags, log=tmp_path_factory.mktemp("serve") / "log") as system:
        yield system


@pytest.fixture(autouse=True)
def nothing_held_afterwards(request: pytest.FixtureRequest) -> Iterator[None]:
    yield
    if "system" in request.fixturenames:
        running_system: System = request.getfixturevalue("system")
        wait_until_whole(running_system)
        running_system.assert_nothing_held()


def wait_until_whole(system: System) -> None:
    eventually(lambda: [w["state"] for w in system.workers()] == ["ready"] * 4, "four workers are ready", 20)


def test_the_openai_client_streams_and_the_ledger_says_disaggregated(system: System) -> None:
    client = openai.OpenAI(base_url=f"{system.base}/v1", api_key="none")
    with client.chat.completions.with_streaming_response.create(
        model=DEFAULT_MODEL,
        messages=[{"role": "user", "content": "Say hello in French."}],
        max_tokens=24,
        temperature=0,
        stream=True,
        stream_options={"include_usage": True},
    ) as response:
        request_id = response.headers["x-request-id"]
        chunks = list(response.parse())
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
    assert text
    usage = chunks[-1].usage
    assert usage is not None
    assert usage.completion_tokens <= 24
    assert usage.prompt_tokens_details is not None
    record = system.record(request_id)
    assert record["decision"] == "disaggregated"
    assert record["kv"]["bytes_received"] == record["kv"]["bytes_expected"] > 0
    assert record["kv"]["pages"] >= 1
    assert record["completion_tokens"] == usage.completion_tokens
    assert record["attempts"] == 1


def test_requests_of_a_killed_prefill_worker_finish_on_another(system: System) -> None:
    prompt = LONG * 60
    wanted = system.complete(prompt + "A").json()["choices"][0]["text"]
    with ThreadPoolExecutor(6) as pool:
        asked = [pool.submit(system.complete, "B" * i + prompt + "A") for i in range(1, 7)]
        busy = eventually(
            lambda: [w for w in system.workers() if w["role"] == "prefill" and w["running"] + w["waiting"]],
            "a prefill worker computes",
        )
        os.kill(busy[0]["pid"], signal.SIGKILL)
        answers = [call.result() for call in asked]
    assert [answer.status_code for answer in answers] == [200] * 6, [a.text for a in answers]
    assert all(answer.json()["usage"]["completion_tokens"] == 32 for answer in answers)
    assert wanted
    attempts = [system.record(answer.headers["x-request-id"])["attempts"] for answer in answers]
    assert max(attempts) > 1
    wait_until_whole(system)


def test_a_stream_outlives_its_decode_worker_without_a_changed_token(system: System) -> None:
    wanted = system.complete("Tell me a long story about a dragon.", max_tokens=200, ignore_eos=True).json()
    texts = []
    with system.stream("Tell me a long story about a dragon.", max_tokens=200, ignore_eos=True) as stream:
        for text in stream:
            texts.append(text)
            if len(texts) == 10:
                busy = eventually(
                    lambda: [w for w in system.workers() if w["role"] == "decode" and w["running"]],
                    "a decode worker says that it runs",
                )
                os.kill(busy[0]["pid"], signal.SIGKILL)
        request_id = stream.request_id
    assert "".join(texts) == wanted["choices"][0]["text"]
    record = system.record(request_id)
    assert record["attempts"] == 2
    assert record["completion_tokens"] == 200


def test_a_killed_worker_takes_requests_again_within_10_s(system: System) -> None:
    before = system.worker("decode-0")["pid"]
    os.kill(before, signal.SIGKILL)
    eventually(
        lambda: any(
            w["id"] == "decode-0" and w["pid"] != before and w["state"] == "ready" for w in system.workers()
        ),
        "decode-0 is back",
        within_s=10,
    )


def test_a_client_that_leaves_frees_both_sides(system: System) -> None:
    with system.stream("Count to a thousand.", max_tokens=2000, ignore_eos=True) as stream:
        next(iter(stream))
        request_id = stream.request_id
    record = system.record(request_id)
    assert record["finish_reason"] == "abort"
    eventually(lambda: all(w["running"] == 0 for w in system.workers()), "nothing runs", within_s=2)


def test_idle_costs_under_a_tenth_of_a_core(system: System) -> None:
    wait_until_whole(system)

    def cpu_s() -> float:
        return sum(sum(p.cpu_times()[:2]) for p in system.processes())

    cpu_s()
    before, began = cpu_s(), time.monotonic()
    time.sleep(5)  # a rate needs a span
    cores = (cpu_s() - before) / (time.monotonic() - began)
    assert cores < 0.1, f"{cores:.3f} cores when idle"


def test_a_thousand_requests_leave_nothing_behind(system: System) -> None:
    def footprint() -> dict[str, int]:
        return {
            "fds": sum(p.num_fds() for p in system.processes()),
            "threads": sum(p.num_threads() for p in system.processes()),
        }

    def ask(numbers: range) -> set[tuple[str, str]]:
        """Complete requests from 32 threads, hang up, and return the pairs of workers that served them."""
        with httpx.Client(base_url=system.base, timeout=120, trust_env=False) as http:

            def complete(i: int) -> str:
                body = {"model": DEFAULT_MODEL, "prompt": f"Request {i}", "max_tokens": 1 + i % 3}
                response = http.post("/v1/completions", json=body)
                assert response.status_code == 200, response.text
                return response.headers["x-request-id"]

            with ThreadPoolExecutor(32) as pool:
                ids = list(pool.map(complete, numbers))
        records = [system.record(request_id) for request_id in ids]
        system.assert_nothing_held()
        return {(record["prefill_worker"], record["decode_worker"]) for record in records}

    pairs: set[tuple[str, str]] = set()  # a pair keeps its connection, so each must have met before the count
    while len(pairs) < 4:
        pairs |= ask(range(100))
    before = footprint()
    ask(range(1000))
    eventually(
        lambda: (now := footprint())["fds"] <= before["fds"] and now["threads"] <= before["threads"],
        f"descriptors and threads are back at {before}, now {footprint()}",
    )


def test_sigterm_lets_a_running_stream_end(tmp_path: Path) -> None:
    """Running requests end, new ones get 503, the status is 0 and no process is left."""
    with running("--num-threads", "1", log=tmp_path / "log") as system:
        with system.stream("Tell me a story.", max_tokens=120, ignore_eos=True) as stream:
            events = iter(stream)
            next(events)
            system.process.send_signal(signal.SIGTERM)
            eventually(lambda: system.http.get("/health").status_code == 503, "/health says 503")
            assert system.complete("one more").status_code == 503
            assert sum(1 for _ in events) > 0
        record_of_stream = stream.response
        assert record_of_stream.is_closed
        assert system.process.wait(20) == 0
    said = (tmp_path / "log").read_text()
    assert "Running requests end first" in said
    assert "leaked" not in said
    assert "Traceback" not in said


def test_sigkill_of_the_parent_leaves_no_process(tmp_path: Path) -> None:
    with running("--num-threads", "1", "--prefill-tp", "3", log=tmp_path / "log") as system:
        processes = system.processes()
        assert len(processes) == 6
        system.process.kill()
        system.process.wait()
        _, alive = psutil.wait_procs(processes, timeout=5)
        assert not alive


def test_a_head_count_that_does_not_divide_is_refused_in_a_sentence() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "disagg", "serve", "--port", "0", "--decode-tp", "2"],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode != 0
    assert "1 or 3" in done.stderr, done.stderr
    assert "Traceback" not in done.stderr
    assert "WARNING" not in done.stderr, "the other processes were waited for"


def test_prefill_and_decode_share_nothing_but_messages(system: System) -> None:
    """Requests in parallel keep their own text."""
    found: dict[int, Any] = {}

    def ask(i: int) -> None:
        found[i] = system.complete(f"The number {i} is", max_tokens=16).json()["choices"][0]["text"]

    threads = [threading.Thread(target=ask, args=(i,)) for i in range(16)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    again = {
        i: system.complete(f"The number {i} is", max_tokens=16).json()["choices"][0]["text"]
        for i in range(16)
    }
    assert found == again
