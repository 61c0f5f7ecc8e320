"""A worker without an engine: speaks the control protocol over real sockets, tokens on a clock.

Pages are counted and not filled; a "push" is the PushDone that would come after it, sent over the
peer link. Tokens are a function of the prompt and the position alone, as a seeded sampler's are, so
that a stream that moves between workers can be compared with `expected_tokens`.

As a process: `python -m support.fake_worker '{"address": "ipc:///…", "role": "decode"}'`; it prints
`ready` when its socket is bound.
"""

import contextlib
import os
import sys
import threading
import time
import zlib
from collections import Counter, deque
from collections.abc import Callable, Iterator
from typing import Annotated, Any
from uuid import uuid4

import msgspec
import numpy as np
import zmq
from msgspec import Meta, Struct, field

from disagg._core import page_hashes
from disagg.protocol import (
    PROTOCOL_VERSION,
    Abort,
    Accepted,
    Failed,
    Fenced,
    FinishReason,
    FirstToken,
    FromWorker,
    Generate,
    Goodbye,
    Hello,
    KvLayout,
    KvReceived,
    Load,
    Prefill,
    PrefillDone,
    PushDone,
    Rejected,
    RejectReason,
    Release,
    Renew,
    Reserve,
    Reserved,
    Role,
    SamplingParams,
    SequenceTokens,
    SnapshotRequest,
    SummaryDelta,
    SummaryDigest,
    SummarySnapshot,
    Target,
    Tokens,
    ToWorker,
    Welcome,
    WorkerState,
    decoder,
    encode,
)

PAGE_SIZE = 16
PAGE_BYTES = 2 * 2 * 4 * 2 * PAGE_SIZE * 8
FIRST_TOKEN_ID = 1000
NUM_TOKEN_IDS = 4000


def token_at(
    prompt: list[int],
    sampling: SamplingParams,
    position: int,
    first: int = FIRST_TOKEN_ID,
    num: int = NUM_TOKEN_IDS,
) -> int:
    """The token that every fake worker draws there."""
    start = zlib.crc32(repr((prompt[-64:], len(prompt), sampling.seed, sampling.choice_index)).encode())
    return first + (start + 7 * position) % num


def expected_tokens(prompt: list[int], sampling: SamplingParams) -> list[int]:
    """The whole output."""
    return [token_at(prompt, sampling, position) for position in range(sampling.max_tokens)]


class FakeWorkerOptions(Struct, kw_only=True):
    """What a fake worker is like, and what goes wrong with it."""

    address: str
    role: Role = "decode"
    worker_id: str = ""
    num_pages: int = 100_000
    max_num_seqs: int = 1024
    max_num_batched_tokens: int = 8192
    max_model_len: int = 8192
    model_name: str = "fake"
    model_hash: str = ""
    tokenizer_hash: str = ""
    protocol_version: int = PROTOCOL_VERSION
    first_token_id: int = FIRST_TOKEN_ID
    num_token_ids: int = NUM_TOKEN_IDS
    step_s: Annotated[float, Meta(ge=0)] = 0.0
    """Between two tokens of a sequence; 0 is as fast as it can."""
    prefill_tokens_per_s: float = 0.0
    """0 computes a prompt in no time."""
    prefill_s: float = 0.0
    """What each prompt takes besides."""
    first_log: str = ""
    """File in which a prefill worker notes when it sent each first token, on the monotonic clock."""
    kv_s: float = 0.0
    """From the first token to the last notification."""
    load_s: float = 0.5
    keeps_prefixes: bool = False
    """Remember prompts, match them and tell of them."""
    reject: list[RejectReason] = field(default_factory=list)
    """Refuse the next requests so."""
    fail: list[str] = field(default_factory=list)
    """Fail the next prefills so, after their first token."""
    hand_back_after: list[int] = field(default_factory=list)
    """Hand the next sequences back after so many tokens."""
    lose: dict[str, int] = field(default_factory=dict)
    """Do not send the next so many messages of a kind, by class name."""
    pid: int | None = None
    """What it says its process is called; another pid namespace numbers others. None tells the truth."""
    mute: bool = False
    """Say nothing at all."""
    lie: bool = False
    """Find nothing of what was promised."""


class _Running(Struct):
    router: bytes
    transfer_id: str
    generation: int
    prompt: list[int]
    sampling: SamplingParams
    position: int
    num_pages: int
    starts_at: float = 0.0
    cached_tokens: int | None = None
    base: int = 0


class _Prefilling(Struct):
    router: bytes
    message: Prefill
    first_at: float
    kv_at: float
    cached_tokens: int
    num_pages: int
    stage: int = 0
    """0 computing, 1 pushing, 2 leased."""


class _Reserved(Struct):
    router: bytes
    message: Reserve
    num_pages: int
    num_missing: int
    is_aborted: bool = False


class FakeEngine:
    """What a fake worker does with messages and time; knows no socket. `send` and `push` do.

    `push` takes a PushDone to the decode worker of a Target.
    """

    def __init__(
        self,
        options: FakeWorkerOptions,
        *,
        send: Callable[[bytes, FromWorker], None],
        push: Callable[[Target, PushDone], None],
        clock: Callable[[], float] = time.monotonic,
        address: str = "",
    ) -> None:
        self.options = options
        self.address = address or options.address
        self.uuid = uuid4().hex
        self.state: WorkerState = "ready"
        self.received: Counter[str] = Counter()
        self.log: deque[ToWorker] = deque(maxlen=1000)
        self.violations: list[str] = []
        """What the router did against the protocol."""
        self.routers: dict[bytes, float] = {}
        self._send_out = send
        self._push_out = push
        self._clock = clock
        self._running: dict[str, _Running] = {}
        self._held: dict[str, _Running] = {}
        self._prefilling: dict[str, _Prefilling] = {}
        self._reserved: dict[tuple[str, int], _Reserved] = {}
        self._newest: dict[str, int] = {}
        self._prefixes: set[int] = set()
        self._seq = 0
        self._busy_until = 0.0
        self._next_step_at = 0.0
        self._next_load_at = 0.0

    @property
    def num_held(self) -> int:
        """Attempts that hold pages here."""
        return len(self._running) + len(self._held) + len(self._prefilling) + len(self._reserved)

    @property
    def pages_in_use(self) -> int:
        """Pages of those."""
        groups = (self._running, self._held, self._prefilling, self._reserved)
        return sum(entry.num_pages for group in groups for entry in group.values())

    def advance(self, now: float) -> None:
        """Do what is due."""
        self._expire(now)
        self._advance_prefills(now)
        if self._running and now >= self._next_step_at:
            self._next_step_at = now + self.options.step_s
            self._step(now)
        if now >= self._next_load_at:
            self._tell_load(now)

    def _expire(self, now: float) -> None:
        for router in [r for r, until in self.routers.items() if until <= now]:
            self._forget(router)

    def _forget(self, router: bytes) -> None:
        """Let go of all that a router holds."""
        self.routers.pop(router, None)
        groups: tuple[dict[Any, Any], ...] = (
            self._running,
            self._held,
            self._prefilling,
            self._reserved,
        )
        for group in groups:
            for key in [key for key, entry in group.items() if entry.router == router]:
                del group[key]

    def next_due(self) -> float:
        """When something is."""
        due = self._next_load_at
        if self._running:
            due = min(due, self._next_step_at)
        for prefill in self._prefilling.values():
            if prefill.stage < 2:
                due = min(due, prefill.first_at if prefill.stage == 0 else prefill.kv_at)
        return due

    def say_goodbye(self) -> None:
        """End on purpose."""
        for router in list(self.routers):
            self._send(router, Goodbye("the worker ends"))

    def _send(self, router: bytes, message: FromWorker) -> None:
        name = type(message).__name__
        if self.options.lose.get(name, 0) > 0:
            self.options.lose[name] -= 1
        elif not self.options.mute:
            self._send_out(router, message)

    # --- messages ----------------------------------------------------------------------------

    def on_router(self, router: bytes, message: ToWorker) -> None:
        self.received[type(message).__name__] += 1
        self.log.append(message)
        if isinstance(message, Hello):
            self._on_hello(router, message)
            return
        if router not in self.routers:
            self.violations.append(f"{type(message).__name__} before Hello")
        if isinstance(message, Reserve | Prefill | Generate):
            if message.generation <= self._newest.get(message.transfer_id, -1):
                self.violations.append(f"{type(message).__name__} of an old generation")
                return
            self._newest[message.transfer_id] = message.generation
            self._on_work(router, message)
        elif isinstance(message, Abort):
            self._on_abort(router, message)
        elif isinstance(message, Release):
            self._on_release(message)
        elif isinstance(message, Fenced):
            self._reserved.pop((message.transfer_id, message.generation), None)
        elif isinstance(message, SnapshotRequest):
            self._tell_snapshot(router)
        elif isinstance(message, Goodbye):
            self._forget(router)
        else:
            assert isinstance(message, Renew)
            self.routers[router] = self._clock() + message.ttl_s

    def _on_work(self, router: bytes, message: Reserve | Prefill | Generate) -> None:
        options = self.options
        num_pages = -(-len(message.token_ids) // PAGE_SIZE)
        reason: RejectReason | None = None
        if options.reject:
            reason = options.reject.pop(0)
        elif self.state == "draining":
            reason = "draining"
        elif self.pages_in_use + num_pages > options.num_pages:
            reason = "no_pages"
        if reason is not None:
            self._send(router, Rejected(message.transfer_id, message.generation, reason))
            return
        cached = self._match(message)
        if isinstance(message, Reserve):
            if message.cap_match:
                cached = min(cached, (len(message.token_ids) - 1) // PAGE_SIZE * PAGE_SIZE)
            key = (message.transfer_id, message.generation)
            first_missing = cached // PAGE_SIZE
            self._reserved[key] = _Reserved(router, message, num_pages, num_pages - first_missing)
            self._send(router, Reserved(*key, first_missing, list(range(num_pages)), cached))
            return
        now = self._clock()
        rate = options.prefill_tokens_per_s
        self._busy_until = max(self._busy_until, now)
        self._busy_until += (len(message.token_ids) - cached) / rate if rate else 0.0
        self._busy_until += self.options.prefill_s
        self._send(router, Accepted(message.transfer_id, message.generation, cached))
        if isinstance(message, Prefill):
            self._prefilling[message.transfer_id] = _Prefilling(
                router, message, self._busy_until, self._busy_until + options.kv_s, cached, num_pages
            )
        else:
            position = len(message.token_ids) - message.num_prompt_tokens
            self._start(router, message, position, num_pages, self._busy_until, cached)

    def _on_abort(self, router: bytes, message: Abort) -> None:
        key = (message.transfer_id, message.generation)
        reserved = self._reserved.get(key)
        if reserved is not None:
            reserved.is_aborted = True
        for group in (self._running, self._held):
            entry = group.get(message.transfer_id)
            if entry is not None and entry.generation <= message.generation:
                del group[message.transfer_id]
        if self.options.role == "prefill":
            prefill = self._prefilling.get(message.transfer_id)
            if prefill is not None and prefill.message.generation <= message.generation:
                del self._prefilling[message.transfer_id]
            self._send(router, Fenced(*key))

    def _on_release(self, message: Release) -> None:
        key = (message.transfer_id, message.generation)
        if key in self._reserved:
            self.violations.append("Release of a reservation whose KV has not come")
        for group in (self._running, self._held):
            entry = group.get(message.transfer_id)
            if entry is not None and entry.generation <= message.generation:
                del group[message.transfer_id]
        prefill = self._prefilling.get(message.transfer_id)
        if prefill is not None and prefill.message.generation <= message.generation:
            if prefill.stage < 2:
                self.violations.append("Release of a prefill that runs")
            del self._prefilling[message.transfer_id]

    def on_push_done(self, message: PushDone) -> None:
        reserved = self._reserved.get((message.transfer_id, message.generation))
        if reserved is None:
            return
        del self._reserved[(message.transfer_id, message.generation)]
        if reserved.is_aborted:
            return
        num_bytes = reserved.num_missing * PAGE_BYTES
        self._send(
            reserved.router,
            KvReceived(
                message.transfer_id,
                message.generation,
                reserved.num_missing,
                num_bytes,
                message.num_bytes,
                0.0,
                "fake",
            ),
        )
        running = self._start(reserved.router, reserved.message, message.position + 1, reserved.num_pages)
        if message.finished:
            self._held[message.transfer_id] = self._running.pop(running.transfer_id)

    # --- work --------------------------------------------------------------------------------

    def _start(
        self,
        router: bytes,
        message: Reserve | Generate,
        position: int,
        num_pages: int,
        starts_at: float = 0.0,
        cached_tokens: int | None = None,
    ) -> _Running:
        running = _Running(
            router,
            message.transfer_id,
            message.generation,
            message.token_ids[: message.num_prompt_tokens],
            message.sampling,
            position,
            num_pages,
            starts_at,
            cached_tokens,
            position,
        )
        if not self._running:
            self._next_step_at = self._clock() + self.options.step_s
        self._running[message.transfer_id] = running
        self._keep(message)
        return running

    def _advance_prefills(self, now: float) -> None:
        for prefill in list(self._prefilling.values()):
            if prefill.stage == 0 and now >= prefill.first_at:
                prefill.stage = 1
                self._tell_first(prefill)
            if prefill.stage == 1 and now >= prefill.kv_at:
                prefill.stage = 2
                self._push(prefill)

    def _tell_first(self, prefill: _Prefilling) -> None:
        message = prefill.message
        position = len(message.token_ids) - message.num_prompt_tokens
        token = self._token_at(message.token_ids[: message.num_prompt_tokens], message.sampling, position)
        finish: FinishReason | None = "length" if position + 1 >= message.sampling.max_tokens else None
        key = (message.transfer_id, message.generation)
        self._keep(message)
        if self.options.first_log:
            with open(self.options.first_log, "a") as log:
                print(self._clock(), file=log)
        self._send(prefill.router, FirstToken(*key, position, token, finish, prefill.cached_tokens, 0.0, 0.0))

    def _push(self, prefill: _Prefilling) -> None:
        message, target = prefill.message, prefill.message.target
        key = (message.transfer_id, message.generation)
        if self.options.fail:
            del self._prefilling[message.transfer_id]
            self._send(prefill.router, Failed(*key, self.options.fail.pop(0), fenced=True))
            return
        position = len(message.token_ids) - message.num_prompt_tokens
        token = self._token_at(message.token_ids[: message.num_prompt_tokens], message.sampling, position)
        num_missing = len(target.page_ids) - target.first_missing_page
        num_bytes = num_missing * PAGE_BYTES
        finished = position + 1 >= message.sampling.max_tokens
        self._push_out(target, PushDone(*key, 0, 0, num_bytes, token, position, finished))
        self._send(prefill.router, PrefillDone(*key, num_missing, num_bytes, self.options.kv_s, "fake"))

    def _step(self, now: float) -> None:
        frames: dict[bytes, list[SequenceTokens]] = {}
        for running in list(self._running.values()):
            if running.starts_at > now:
                continue
            part = self._draw(running)
            frames.setdefault(running.router, []).append(part)
        for router, parts in frames.items():
            self._send(router, Tokens(parts))

    def _token_at(self, prompt: list[int], sampling: SamplingParams, position: int) -> int:
        options = self.options
        return token_at(prompt, sampling, position, options.first_token_id, options.num_token_ids)

    def _draw(self, running: _Running) -> SequenceTokens:
        position, sampling = running.position, running.sampling
        token = self._token_at(running.prompt, sampling, position)
        running.position += 1
        finish: FinishReason | None = None
        if running.position >= sampling.max_tokens:
            finish = "length"
            self._held[running.transfer_id] = self._running.pop(running.transfer_id)
        elif self.options.hand_back_after:
            made = running.position - running.base
            if made >= self.options.hand_back_after[0]:
                self.options.hand_back_after.pop(0)
                finish = "handed_back"
                del self._running[running.transfer_id]
        cached, running.cached_tokens = running.cached_tokens, None
        return SequenceTokens(running.transfer_id, running.generation, position, [token], finish, cached)

    # --- what it tells -----------------------------------------------------------------------

    def _on_hello(self, router: bytes, hello: Hello) -> None:
        options = self.options
        self.routers[router] = self._clock() + hello.lease_ttl_s
        self._send(
            router,
            Welcome(
                protocol_version=options.protocol_version,
                worker_id=options.worker_id or f"{options.role}-0",
                uuid=self.uuid,
                role=options.role,
                state=self.state,
                model_name=options.model_name,
                pid=options.pid or os.getpid(),
                rank_pids=[options.pid or os.getpid()],
                metrics_url="",
                peer_address=self.address,
                max_model_len=options.max_model_len,
                max_num_seqs=options.max_num_seqs,
                max_num_batched_tokens=options.max_num_batched_tokens,
                num_pages=options.num_pages,
                layout=KvLayout(PAGE_SIZE, 4, 2, 8, "bfloat16", 1),
                eos_token_ids=[0],
                dtype="bfloat16",
                transport="fake",
                model_hash=options.model_hash,
                tokenizer_hash=options.tokenizer_hash,
            ),
        )
        self._tell_snapshot(router)
        self._next_load_at = 0.0

    def _tell_load(self, now: float) -> None:
        options = self.options
        self._next_load_at = now + options.load_s
        in_use = self.pages_in_use
        queued = sum(len(p.message.token_ids) for p in self._prefilling.values() if p.stage == 0)
        load = Load(
            state=self.state,
            running=len(self._running),
            waiting=0,
            leases=self.num_held - len(self._running),
            queued_tokens=queued,
            pages_total=options.num_pages,
            pages_free=options.num_pages - in_use,
            pages_cached=0,
            pages_in_use=in_use,
            prefill_tokens_per_s=options.prefill_tokens_per_s or 1e6,
            decode_step_s=options.step_s or 1e-4,
        )
        for router in list(self.routers):
            self._send(router, load)
        if options.keeps_prefixes:
            xor = int(np.bitwise_xor.reduce(np.array(list(self._prefixes), np.uint64), initial=0))
            for router in list(self.routers):
                self._send(router, SummaryDigest(1, self._seq, len(self._prefixes), xor))

    def _tell_snapshot(self, router: bytes) -> None:
        hashes = np.array(list(self._prefixes), "<u8").tobytes()
        self._send(router, SummarySnapshot(1, self._seq, hashes, True))

    def _match(self, message: Reserve | Prefill | Generate) -> int:
        if not self.options.keeps_prefixes or self.options.lie:
            return 0
        matched = 0
        for page in self._hashes(message):
            if page not in self._prefixes:
                break
            matched += 1
        return min(matched * PAGE_SIZE, len(message.token_ids) - 1)

    def _keep(self, message: Reserve | Prefill | Generate) -> None:
        if not self.options.keeps_prefixes:
            return
        new = [page for page in self._hashes(message) if page not in self._prefixes]
        if not new:
            return
        self._prefixes.update(new)
        self._seq += 1
        delta = SummaryDelta(1, self._seq, np.array(new, "<u8").tobytes(), b"")
        for router in list(self.routers):
            self._send(router, delta)

    def _hashes(self, message: Reserve | Prefill | Generate) -> list[int]:
        tokens = np.array(message.token_ids, np.int32)
        hashes: list[int] = page_hashes(tokens, PAGE_SIZE, message.cache_salt).tolist()
        return hashes


class FakeWorker:
    """A fake engine behind real sockets. `run` serves until `stop`; `kill` drops all without a word."""

    def __init__(
        self, options: FakeWorkerOptions, context: "zmq.Context[zmq.Socket[bytes]] | None" = None
    ) -> None:
        self._context = context or zmq.Context.instance()
        self._socket: zmq.Socket[bytes] = self._context.socket(zmq.ROUTER)
        self._socket.setsockopt(zmq.SNDHWM, 0)
        self._socket.setsockopt(zmq.RCVHWM, 0)
        if options.address.startswith("ipc://"):
            with contextlib.suppress(FileNotFoundError):
                os.unlink(options.address.removeprefix("ipc://"))
        self._socket.bind(options.address)
        self.address = self._socket.getsockopt_string(zmq.LAST_ENDPOINT).rstrip("\0")
        self.options = options
        self.engine = FakeEngine(options, send=self._send, push=self._push, address=self.address)
        self._peers: dict[str, zmq.Socket[bytes]] = {}
        self._decode_router = decoder(ToWorker).decode
        self._decode_peer = decoder(PushDone).decode
        self._stopping = False
        self._killed = False

    def stop(self) -> None:
        """End on purpose, with a Goodbye."""
        self._stopping = True

    def kill(self) -> None:
        """End as a process that was killed does."""
        self._killed = self._stopping = True

    def run(self) -> None:
        """Serve."""
        try:
            while not self._stopping:
                self._turn()
        finally:
            if not self._killed:
                self.engine.say_goodbye()
            for socket in (self._socket, *self._peers.values()):
                socket.close(linger=0 if self._killed else 100)

    @contextlib.contextmanager
    def in_thread(self) -> Iterator["FakeWorker"]:
        """Serve in a thread while the block runs."""
        thread = threading.Thread(target=self.run, name=f"fake-{self.options.role}")
        thread.start()
        try:
            yield self
        finally:
            self.stop()
            thread.join(5)
            assert not thread.is_alive()

    def _turn(self) -> None:
        timeout_s = max(0.0, min(self.engine.next_due() - time.monotonic(), 0.02))
        if self._socket.poll(int(timeout_s * 1e3 + 0.999)):
            self._receive()
        self.engine.advance(time.monotonic())

    def _receive(self) -> None:
        while True:
            try:
                identity, payload = self._socket.recv_multipart(zmq.NOBLOCK)
            except zmq.Again:
                return
            if identity.startswith(b"peer:"):
                self.engine.on_push_done(self._decode_peer(payload))
            else:
                self.engine.on_router(identity, self._decode_router(payload))

    def _send(self, router: bytes, message: FromWorker) -> None:
        self._socket.send_multipart((router, encode(message)))

    def _push(self, target: Target, message: PushDone) -> None:
        peer = self._peers.get(target.uuid)
        if peer is None:
            peer = self._peers[target.uuid] = self._context.socket(zmq.DEALER)
            peer.setsockopt(zmq.IDENTITY, b"peer:" + self.engine.uuid.encode())
            peer.setsockopt(zmq.SNDHWM, 0)
            peer.connect(target.peer_address)
        peer.send(encode(message))


def main() -> None:
    worker = FakeWorker(msgspec.json.decode(sys.argv[1], type=FakeWorkerOptions))
    print("ready", flush=True)
    worker.run()


if __name__ == "__main__":
    main()
