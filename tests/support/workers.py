"""Real worker processes, and a small router that speaks the protocol to them."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import psutil
import zmq
from msgspec.structs import replace

from disagg.config import EngineConfig, LeaseConfig, ModelConfig, NodesConfig, WorkerConfig, flatten
from disagg.protocol import (
    PROTOCOL_VERSION,
    Failed,
    FirstToken,
    FromWorker,
    Generate,
    Hello,
    Load,
    Prefill,
    Release,
    Renew,
    Reserve,
    Reserved,
    SamplingParams,
    SequenceTokens,
    SummaryDelta,
    SummaryDigest,
    SummarySnapshot,
    Target,
    Tokens,
    ToWorker,
    Welcome,
    decoder,
    encode,
)

LIMIT_S = 20.0
TTL_S = 20.0

M = TypeVar("M")

KINDS: dict[str, Any] = {
    "engine": EngineConfig,
    "model": ModelConfig,
    "lease": LeaseConfig,
    "nodes": NodesConfig,
}


def eventually(condition: Callable[[], Any], what: Any, within_s: float = LIMIT_S) -> Any:
    """Return the first true value of `condition`, or fail with what was awaited."""
    until = time.monotonic() + within_s
    while not (value := condition()):
        assert time.monotonic() < until, f"not within {within_s} s: {what() if callable(what) else what}"
        time.sleep(0.01)
    return value


class WorkerProcess:
    """One `disagg worker` process."""

    def __init__(self, process: "subprocess.Popen[bytes]", config: WorkerConfig, events_fd: int) -> None:
        self.process = process
        self.config = config
        self._events = os.fdopen(events_fd, "rb")
        self.events: list[dict[str, Any]] = []
        self.ready: dict[str, Any] = {}

    def wait_ready(self) -> "WorkerProcess":
        for line in self._events:
            self.events.append(json.loads(line))
            if self.events[-1]["event"] == "ready":
                self.ready = self.events[-1]
                return self
        raise AssertionError(f"{self.config.worker_id} ended with status {self.process.wait()}")

    @property
    def control(self) -> str:
        return str(self.ready["control"])

    @property
    def http(self) -> str:
        return str(self.ready["http"])

    def tree(self) -> list[psutil.Process]:
        root = psutil.Process(self.process.pid)
        return [root, *root.children(recursive=True)]

    def cpu_s(self) -> float:
        """Processor time of all ranks so far."""
        return sum(sum(p.cpu_times()[:2]) for p in self.tree())

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()

    def terminate(self, within_s: float = 30.0) -> int:
        self.process.send_signal(signal.SIGTERM)
        return self.process.wait(within_s)

    def close(self) -> None:
        started = self.tree() if self.process.poll() is None else []
        self.process.kill()
        self.process.wait()
        self._events.close()
        _, alive = psutil.wait_procs(started, timeout=5)
        for left in alive:
            left.kill()
        assert not alive, f"ranks outlived their worker: {alive}"


def make_config(
    folder: Path, checkpoint: Path, role: str, name: str, tp: int = 1, **changes: Any
) -> WorkerConfig:
    """A small worker on an ipc socket in `folder`; `changes` replace fields of any part."""
    engine = {
        "tensor_parallel_size": tp,
        "max_num_seqs": 8,
        "max_num_batched_tokens": 64,
        "block_size": 4,
        "kv_cache_memory_bytes": 4 << 20,
        "num_threads": 1,
    }
    parts: dict[str, dict[str, Any]] = {
        "engine": engine,
        "model": {"model": str(checkpoint), "dtype": "float32", "device": "cpu"},
        "lease": {"drain_seconds": 10.0},
        "nodes": {},
    }
    for key, value in changes.items():
        for part, kind in KINDS.items():
            if key in kind.__struct_fields__:
                parts[part][key] = value
    return WorkerConfig(
        role=role,  # type: ignore[arg-type]
        worker_id=name,
        control=changes.get("control", f"ipc://{folder}/{name}.sock"),
        advertise_host=changes.get("advertise_host"),
        transport_keys=changes.get("transport_keys"),
        http_host=changes.get("http_host", "127.0.0.1"),
        http_port=0,
        engine=EngineConfig(**parts["engine"]),
        model=ModelConfig(**parts["model"]),
        lease=LeaseConfig(**parts["lease"]),
        nodes=NodesConfig(**parts["nodes"]),
    )


def start_worker(config: WorkerConfig, folder: Path, namespace: str | None = None) -> WorkerProcess:
    """Start `disagg worker` as the supervisor does, in a network namespace if one is named."""
    file = folder / f"{config.worker_id}.json"
    file.write_text(json.dumps(flatten(config)))
    events_fd, child_fd = os.pipe()
    arguments = [
        "worker",
        "--config",
        str(file),
        "--ready-fd",
        str(child_fd),
        "--parent-pid",
        str(os.getpid()),
    ]
    entering = ["ip", "netns", "exec", namespace] if namespace is not None else []
    with (folder / f"{config.worker_id}.log").open("ab") as log:
        process = subprocess.Popen(
            [*entering, sys.executable, "-m", "disagg", *arguments],
            pass_fds=[child_fd],
            stdin=subprocess.DEVNULL,
            start_new_session=True,
            stderr=log,
        )
    os.close(child_fd)
    return WorkerProcess(process, config, events_fd)


@contextmanager
def running_workers(folder: Path, *configs: WorkerConfig) -> Iterator[list[WorkerProcess]]:
    """Start workers side by side; afterwards nothing of them is left."""
    workers = [start_worker(config, folder) for config in configs]
    try:
        yield [worker.wait_ready() for worker in workers]
    finally:
        for worker in workers:
            worker.close()
        for worker in workers:
            print((folder / f"{worker.config.worker_id}.log").read_text(), file=sys.stderr)


class Link:
    """A router's link to one worker; keeps all that the worker said.

    Transfer ids are prefixed with the router's on the way, so that tests which share workers may
    call theirs alike.
    """

    def __init__(
        self, context: "zmq.Context[zmq.Socket[bytes]]", worker: WorkerProcess, router_id: str
    ) -> None:
        self.worker = worker
        self._prefix = f"{router_id}/"
        self.messages: list[FromWorker] = []
        self.load: Load | None = None
        self._socket: zmq.Socket[bytes] = context.socket(zmq.DEALER)
        self._socket.setsockopt(zmq.LINGER, 0)
        self._socket.connect(worker.control)
        self._decoder = decoder(FromWorker)
        self.send(Hello(PROTOCOL_VERSION, router_id, TTL_S))
        self.welcome = self.expect(Welcome)

    def send(self, message: ToWorker) -> None:
        if hasattr(message, "transfer_id"):
            message = replace(message, transfer_id=self._prefix + message.transfer_id)
        self._socket.send(encode(message))

    def send_raw(self, *frames: bytes) -> None:
        self._socket.send_multipart(frames)

    def pump(self, wait_s: float = 0.0) -> None:
        """Take in what has arrived, waiting a moment for some."""
        if not self._socket.poll(int(wait_s * 1000)):
            return
        while self._socket.poll(0):
            message = self._unprefixed(self._decoder.decode(self._socket.recv()))
            if isinstance(message, Load):
                self.load = message
            self.messages.append(message)

    def _unprefixed(self, message: Any) -> Any:
        if isinstance(message, Tokens):
            return Tokens([self._unprefixed(sequence) for sequence in message.sequences])
        if hasattr(message, "transfer_id"):
            assert message.transfer_id.startswith(self._prefix), "told of another router's transfer"
            return replace(message, transfer_id=message.transfer_id.removeprefix(self._prefix))
        return message

    def find(self, kind: type[M], **fields: Any) -> M | None:
        for message in self.messages:
            if isinstance(message, kind) and all(getattr(message, k) == v for k, v in fields.items()):
                return message
        return None

    def expect(self, kind: type[M], within_s: float = LIMIT_S, **fields: Any) -> M:
        """Wait for a message of this kind with these fields, among all there have been."""
        until = time.monotonic() + within_s
        while (found := self.find(kind, **fields)) is None:
            assert time.monotonic() < until, f"no {kind.__name__} {fields}; said: {self.interesting()}"
            self.pump(0.05)
        return found

    def interesting(self) -> list[FromWorker]:
        """The newest of what a failed assertion should show."""
        dull = (Load, SummaryDelta, SummaryDigest, SummarySnapshot, Tokens)
        return [message for message in self.messages if not isinstance(message, dull)][-12:]

    def tokens(self, transfer_id: str) -> list[SequenceTokens]:
        return [
            sequence
            for message in self.messages
            if isinstance(message, Tokens)
            for sequence in message.sequences
            if sequence.transfer_id == transfer_id
        ]

    def next_load(self, condition: Callable[[Load], bool], within_s: float = LIMIT_S) -> Load:
        """Wait for a Load from now on that satisfies the condition."""
        self.pump()
        self.load = None
        until = time.monotonic() + within_s
        while self.load is None or not condition(self.load):
            assert time.monotonic() < until, f"load stays {self.load}; said: {self.interesting()}"
            self.pump(0.05)
        return self.load

    def assert_balanced(self, within_s: float = LIMIT_S) -> None:
        """Nothing is held any more, and every page is free or cached."""
        load = self.next_load(lambda load: load.leases == load.pages_in_use == load.running == 0, within_s)
        assert load.pages_free + load.pages_cached == load.pages_total

    def close(self) -> None:
        self._socket.close()


class Router:
    """A router with one link to each of some workers."""

    def __init__(self, *workers: WorkerProcess, router_id: str = "router-0") -> None:
        self._context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        self.router_id = router_id
        self.links = [Link(self._context, worker, router_id) for worker in workers]

    def __enter__(self) -> "Router":
        return self

    def __exit__(self, *exc: Any) -> None:
        for link in self.links:
            link.close()
        self._context.term()

    def connect(self, worker: WorkerProcess) -> Link:
        self.links.append(Link(self._context, worker, self.router_id))
        return self.links[-1]

    def renew(self) -> None:
        for link in self.links:
            link.send(Renew(TTL_S))


def greedy(max_tokens: int = 16, **fields: Any) -> SamplingParams:
    return SamplingParams(max_tokens=max_tokens, temperature=0.0, **fields)


def reserve(link: Link, transfer_id: str, tokens: list[int], generation: int = 0, **fields: Any) -> Reserved:
    """Reserve pages and wait for them."""
    defaults = {"ttl_s": TTL_S, "num_prompt_tokens": len(tokens), "sampling": greedy(), "cap_match": True}
    message = Reserve(
        transfer_id=transfer_id, generation=generation, token_ids=tokens, **{**defaults, **fields}
    )
    link.send(message)
    return link.expect(Reserved, transfer_id=transfer_id, generation=generation)


def prefill(
    link: Link, to: Link, reserved: Reserved, tokens: list[int], deadline_s: float = 30.0, **fields: Any
) -> None:
    """Have the prompt computed and pushed to where it was reserved."""
    defaults = {"ttl_s": TTL_S, "num_prompt_tokens": len(tokens), "sampling": greedy()}
    target = Target(
        to.welcome.worker_id,
        to.welcome.uuid,
        to.welcome.peer_address,
        reserved.first_missing_page,
        reserved.page_ids,
    )
    link.send(
        Prefill(
            transfer_id=reserved.transfer_id,
            generation=reserved.generation,
            deadline_s=deadline_s,
            token_ids=tokens,
            target=target,
            **{**defaults, **fields},
        )
    )


def finish(link: Link, transfer_id: str, generation: int = 0) -> tuple[list[int], str]:
    """Wait until a sequence ends here; its tokens from this worker, and why it ended."""
    until = time.monotonic() + LIMIT_S
    while True:
        parts = [part for part in link.tokens(transfer_id) if part.generation == generation]
        if parts and parts[-1].finish_reason is not None:
            positions = [part.position + i for part in parts for i in range(len(part.token_ids))]
            assert (
                positions == list(range(positions[0], positions[0] + len(positions))) if positions else True
            )
            return [token for part in parts for token in part.token_ids], parts[-1].finish_reason
        assert link.find(Failed, transfer_id=transfer_id, generation=generation) is None, link.interesting()
        assert time.monotonic() < until, link.interesting()
        link.pump(0.05)


def run_disaggregated(
    p: Link, d: Link, transfer_id: str, tokens: list[int], generation: int = 0, **fields: Any
) -> tuple[list[int], str]:
    """One request through both workers; all its output tokens, and why it ended."""
    reserved = reserve(d, transfer_id, tokens, generation, **fields)
    prefill(p, d, reserved, tokens, **fields)
    first = p.expect(FirstToken, transfer_id=transfer_id, generation=generation)
    if first.finish_reason is not None:
        return [first.token_id], first.finish_reason
    rest, reason = finish(d, transfer_id, generation)
    for link in (p, d):
        link.send(Release(transfer_id, generation))
    return [first.token_id, *rest], reason


def run_local(link: Link, transfer_id: str, tokens: list[int], **fields: Any) -> tuple[list[int], str]:
    """One request through one worker."""
    defaults = {"ttl_s": TTL_S, "num_prompt_tokens": len(tokens), "sampling": greedy()}
    link.send(Generate(transfer_id=transfer_id, generation=0, token_ids=tokens, **{**defaults, **fields}))
    output = finish(link, transfer_id)
    link.send(Release(transfer_id, 0))
    return output
