"""Whole systems with transport keys, reached over an address of this machine that is not loopback."""

import ssl
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest
import zmq

from disagg.config import RouterConfig, WorkerConfig
from disagg.errors import ConfigError
from disagg.protocol import PROTOCOL_VERSION, Hello, encode
from disagg.router.app import run_router
from disagg.security import HANDSHAKE_FAILED, KeyPair
from disagg.worker import run_worker
from support.certificates import Certificate, trusted
from support.checkpoints import make_checkpoint
from support.keyed import (
    MODEL,
    KeyedSystem,
    keyed_system,
    wait_for_workers,
    workers_of,
)
from support.keys import secret
from support.sockets import needs_ipv6
from support.system import eventually

UCX_PORTS = range(20000, 21000)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def system(tmp_path_factory: pytest.TempPathFactory, checkpoint: Path) -> Iterator[KeyedSystem]:
    with keyed_system(
        tmp_path_factory.mktemp("s"), checkpoint, "prefill-0", "decode-0", current="a"
    ) as system:
        yield system


@pytest.fixture(scope="module")
def http(system: KeyedSystem) -> Iterator[httpx.Client]:
    base = f"http://{system.start_router('router')}"
    with httpx.Client(base_url=base, timeout=60, trust_env=False) as http:
        wait_for_workers(http, "prefill-0", "decode-0")
        yield http


def complete(http: httpx.Client, number: int = 0, max_tokens: int = 16) -> httpx.Response:
    """A request whose whole output is determined by its number."""
    body = {"model": MODEL, "prompt": [3 + (7 * i + number) % 300 for i in range(40)], "seed": number}
    return http.post("/v1/completions", json=body | {"max_tokens": max_tokens, "ignore_eos": True})


def test_kv_moves_between_workers_that_are_not_on_loopback(system: KeyedSystem, http: httpx.Client) -> None:
    answer = complete(http)
    assert answer.status_code == 200, answer.text
    record = eventually(
        lambda: (
            (r := http.get(f"/disagg/requests/{answer.headers['x-request-id']}").json()).get("release") and r
        ),
        "its record is closed",
    )
    assert record["decision"] == "disaggregated"
    assert record["kv"]["bytes_received"] == record["kv"]["bytes_expected"] > 0
    for worker in workers_of(http).values():
        ports = {
            connection.laddr.port
            for connection in psutil.Process(worker["pid"]).net_connections("tcp")
            if connection.status == psutil.CONN_LISTEN
        }
        known = {int(system.control(worker["id"]).rpartition(":")[2])}
        known.add(int(worker["metrics_url"].rpartition(":")[2].partition("/")[0]))
        assert ports - known, "UCX listens"
        assert all(port in UCX_PORTS for port in ports - known)


@pytest.mark.parametrize("names", [None, ("x", "x"), ("x", "a"), ("a", "x")])
@pytest.mark.parametrize("worker", ["prefill-0", "decode-0"])
def test_a_stranger_gets_nothing_from_a_control_port(
    system: KeyedSystem, http: httpx.Client, worker: str, names: tuple[str, str] | None
) -> None:
    """Without CURVE, with foreign keys, with a foreign key and ours for the server, the other way round."""
    context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
    with context, context.socket(zmq.DEALER) as client:
        client.setsockopt(zmq.LINGER, 0)
        if names is not None:
            own, server = (KeyPair.from_secret(secret(name)) for name in names)
            client.setsockopt(zmq.CURVE_PUBLICKEY, own.public)
            client.setsockopt(zmq.CURVE_SECRETKEY, own.secret)
            client.setsockopt(zmq.CURVE_SERVERKEY, server.public)
        with client.get_monitor_socket(HANDSHAKE_FAILED) as monitor:
            client.connect(system.control(worker))
            client.send(encode(Hello(PROTOCOL_VERSION, "rogue", 30.0)))
            assert monitor.poll(10_000), "the handshake fails"
            client.disable_monitor()
        assert complete(http, 1, 2).status_code == 200
        assert not client.poll(0)


def test_an_idle_system_with_keys_costs_under_a_tenth_of_a_core(
    system: KeyedSystem, http: httpx.Client
) -> None:
    processes = [psutil.Process(process.popen.pid) for process in system.processes.values()]
    complete(http, 2, 2)
    # What the last request left to do does not count: the cheapest of a few intervals is idle.
    shares = []
    for _ in range(3):
        before = sum(sum(process.cpu_times()[:2]) for process in processes)
        threading.Event().wait(2.0)
        shares.append((sum(sum(process.cpu_times()[:2]) for process in processes) - before) / 2.0)
    assert min(shares) < 0.1, shares


def test_api_keys_and_certificate_are_renewed_on_a_running_router(
    system: KeyedSystem, http: httpx.Client, tmp_path: Path
) -> None:
    """Each within five seconds; answers that are on their way are not disturbed."""
    del http  # the workers are ready
    files = Certificate(tmp_path, "one")
    keys = tmp_path / "api-keys"
    keys.write_text("first\n")
    address = system.start_router(
        "router-tls",
        *("--tls-certificate", str(files.certificate), "--tls-key", str(files.key)),
        *("--api-key-file", str(keys)),
    )

    def status(certificate: str, key: str) -> int | None:
        """Of a new connection; None where its certificate is not trusted."""
        context = ssl.create_default_context(cafile=trusted(certificate))
        try:
            return httpx.get(
                f"https://{address}/disagg/workers",
                headers={"authorization": f"Bearer {key}"},
                verify=context,
                trust_env=False,
            ).status_code
        except httpx.ConnectError:
            return None

    assert status("one", "first") == 200
    assert status("one", "second") == 401
    assert status("two", "first") is None
    keys.write_text("second\n")
    eventually(lambda: status("one", "second") == 200, "the new key counts", 5)
    assert status("one", "first") == 401
    files.write("two")
    eventually(lambda: status("two", "second") == 200, "the new certificate is shown", 5)
    assert status("one", "second") is None
    keys.unlink()
    files.key.unlink()
    log = system.processes["router-tls"].log
    eventually(
        lambda: status("two", "second") and log.read_text().count("what there was stays") == 2,
        "both are told",
        5,
    )
    assert status("two", "second") == 200


class Load:
    """Clients that ask one request after another, of whichever router is the one to ask now."""

    def __init__(self, base: str, expected: dict[int, Any]) -> None:
        self.base = base
        self._expected = expected
        self.num_done = 0
        self.wrong: list[str] = []
        self._stop = threading.Event()
        self._threads = [threading.Thread(target=self._run, args=(number,)) for number in range(3)]

    def __enter__(self) -> "Load":
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *exc: Any) -> None:
        self._stop.set()
        for thread in self._threads:
            thread.join()

    def wait_for_more(self) -> None:
        done = self.num_done
        eventually(lambda: self.wrong or self.num_done > done + 6, "requests go on", 60)

    def _run(self, number: int) -> None:
        while not self._stop.is_set():
            try:
                with httpx.Client(base_url=self.base, timeout=60, trust_env=False) as http:
                    answer = complete(http, number, 60)
            except httpx.HTTPError as error:
                self.wrong.append(repr(error))
                continue
            if answer.status_code != 200 or answer.json()["choices"][0]["text"] != self._expected[number]:
                self.wrong.append(answer.text)
            self.num_done += 1


def test_a_rotation_under_load_loses_no_request(tmp_path: Path, checkpoint: Path) -> None:
    """Add `next`, swap and restart every process, drop `previous`; answers stay what they were."""
    workers = ("prefill-0", "decode-0", "decode-1")
    with keyed_system(tmp_path, checkpoint, *workers, current="a") as system:
        base = f"http://{system.start_router('router-0')}"
        with httpx.Client(base_url=base, timeout=60, trust_env=False) as http:
            wait_for_workers(http, *workers)
            expected = {n: complete(http, n, 60).json()["choices"][0]["text"] for n in range(3)}
        with Load(base, expected) as load:
            load.wait_for_more()
            system.keys.write(current="a", next="b")
            load.wait_for_more()
            system.keys.write(current="b", previous="a")
            load.wait_for_more()
            for name in workers:
                system.processes[name].terminate()
                system.start_worker(name)
                system.wait_worker(name)
                with httpx.Client(base_url=load.base, timeout=60, trust_env=False) as http:
                    wait_for_workers(http, *workers)
                load.wait_for_more()
                if name == "decode-0":  # a new router meets old workers and new ones
                    load.base = f"http://{system.start_router('router-1')}"
                    with httpx.Client(base_url=load.base, timeout=60, trust_env=False) as http:
                        wait_for_workers(http, *workers)
                    load.wait_for_more()
                    system.processes["router-0"].terminate()
            system.keys.write(current="b")
            load.wait_for_more()
            load.base = f"http://{system.start_router('router-2')}"
            with httpx.Client(base_url=load.base, timeout=60, trust_env=False) as http:
                wait_for_workers(http, *workers)
            load.wait_for_more()
        assert load.wrong == []
        said = "".join(process.log.read_text() for process in system.processes.values())
        assert "handshake" not in said
        assert "Traceback" not in said


def test_what_cannot_be_kept_safe_is_refused_at_start() -> None:
    def ready(event: dict[str, Any]) -> None:
        raise AssertionError(event)

    with pytest.raises(ConfigError, match="control must be a loopback address"):
        run_worker(WorkerConfig(control="tcp://0.0.0.0:0"), ready=ready)
    with pytest.raises(ConfigError, match="transport_keys '/nowhere' cannot be used"):
        run_worker(WorkerConfig(transport_keys="/nowhere"), ready=ready)
    with pytest.raises(ConfigError, match="workers must be loopback addresses without transport_keys"):
        run_router(RouterConfig(workers=("tcp://10.0.0.1:1",)), ready=ready)
    with pytest.raises(ConfigError, match="transport_keys '/nowhere' cannot be used"):
        run_router(RouterConfig(transport_keys="/nowhere"), ready=ready)


@needs_ipv6
def test_a_system_on_ipv6_alone(tmp_path: Path, checkpoint: Path) -> None:
    """Links, KV, metrics and both HTTP ports, where every part binds every interface as the chart does."""
    with keyed_system(tmp_path, checkpoint, "prefill-0", "decode-0", host="::1", current="a") as system:
        port = system.start_router("router", "--peer-bind", "tcp://*:0", host="*").rpartition(":")[2]
        with httpx.Client(base_url=f"http://[::1]:{port}", timeout=60, trust_env=False) as http:
            wait_for_workers(http, "prefill-0", "decode-0")
            answer = complete(http)
            record = http.get(f"/disagg/requests/{answer.headers['x-request-id']}").json()
            assert record["decision"] == "disaggregated"
            assert record["kv"]["bytes_received"] == record["kv"]["bytes_expected"] > 0
            for name, worker in workers_of(http).items():
                assert system.control(name).startswith("tcp://[::1]:")
                assert worker["metrics_url"].startswith("http://[::1]:")
                assert httpx.get(worker["metrics_url"], trust_env=False).status_code == 200
        assert httpx.get(f"http://127.0.0.1:{port}/health", trust_env=False).status_code == 200
