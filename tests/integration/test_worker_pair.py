"""Real worker processes of every role over real ZeroMQ and NIXL, driven by a small router."""

import json
import os
import signal
import threading
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil
import pytest
import zmq

from disagg.errors import ConfigError
from disagg.protocol import (
    Abort,
    Accepted,
    Failed,
    Fenced,
    FirstToken,
    Generate,
    Goodbye,
    Hello,
    KvReceived,
    PrefillDone,
    Rejected,
    Renew,
    Reserve,
    Reserved,
    SamplingParams,
    SummarySnapshot,
    encode,
)
from disagg.worker import run_worker
from support.checkpoints import make_checkpoint
from support.workers import (
    TTL_S,
    Link,
    Router,
    WorkerProcess,
    eventually,
    finish,
    greedy,
    make_config,
    prefill,
    reserve,
    run_disaggregated,
    run_local,
    running_workers,
    start_worker,
)

PAGE_SIZE = 4
PAGE_BYTES = PAGE_SIZE * 6 * 3 * 2 * 16 * 4
"""6 KV heads, 3 layers, K and V, 16 elements of 4 bytes."""


def prompt(length: int, seed: int = 0) -> list[int]:
    return [3 + (7 * i + 13 * seed * (i % 5) + seed) % 300 for i in range(length)]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("model"))


@contextmanager
def pair(
    folder: Path, model: Path, ptp: int = 1, dtp: int = 1, **changes: object
) -> Iterator[tuple[Link, Link]]:
    configs = (
        make_config(folder, model, "prefill", "prefill-0", ptp, **changes),
        make_config(folder, model, "decode", "decode-0", dtp, **changes),
    )
    with running_workers(folder, *configs) as (p, d), Router(p, d) as router:
        yield router.links[0], router.links[1]


@pytest.fixture(scope="module")
def system(tmp_path_factory: pytest.TempPathFactory, model: Path) -> Iterator[list[WorkerProcess]]:
    """One worker of each role, for every test that kills none."""
    folder = tmp_path_factory.mktemp("system")
    configs = [make_config(folder, model, role, f"{role}-0") for role in ("prefill", "decode", "unified")]
    with running_workers(folder, *configs) as workers:
        yield workers


@pytest.fixture
def links(system: list[WorkerProcess]) -> Iterator[list[Link]]:
    """A new router; afterwards every worker balances."""
    with Router(*system, router_id=f"router-{time.monotonic_ns()}") as router:
        yield router.links
        for link in router.links:
            link.send(Goodbye())
            link.send(Hello(1, "the last one", TTL_S))
            link.assert_balanced()


class TestOutput:
    """Prefill and decode in two processes make what one process makes."""

    @pytest.mark.parametrize("length", [1, 3, 4, 5, 64, 65, 200])
    def test_tokens_equal_a_unified_workers(self, links: list[Link], length: int) -> None:
        p, d, u = links
        tokens = prompt(length)
        assert run_disaggregated(p, d, f"t{length}", tokens) == run_local(u, f"u{length}", tokens)

    def test_seeded_tokens_equal_a_unified_workers(self, links: list[Link]) -> None:
        p, d, u = links
        tokens = prompt(30, 4)
        drawn = SamplingParams(temperature=0.8, top_p=0.9, seed=2**63 + 5, max_tokens=20)
        whole = run_local(u, "seeded-u", tokens, sampling=drawn)
        assert run_disaggregated(p, d, "seeded", tokens, sampling=drawn) == whole

    def test_every_byte_is_accounted_for_and_warm_caches_move_less(self, links: list[Link]) -> None:
        p, d, u = links
        tokens = prompt(101, 2)
        cold = run_disaggregated(p, d, "cold", tokens)
        warm = run_disaggregated(p, d, "warm", tokens)
        assert cold == warm == run_local(u, "u", tokens)
        for transfer_id, num_pages in (("cold", 26), ("warm", 1)):
            done = p.expect(PrefillDone, transfer_id=transfer_id)
            received = d.expect(KvReceived, transfer_id=transfer_id)
            assert done.num_pages == received.num_pages == num_pages
            assert (
                done.num_bytes == received.bytes_expected == received.bytes_received == num_pages * PAGE_BYTES
            )
            assert done.transport == received.transport == "nixl"
        assert p.expect(FirstToken, transfer_id="warm").cached_tokens == 100
        assert d.expect(Reserved, transfer_id="warm").cached_tokens == 100

    def test_many_at_once(self, links: list[Link]) -> None:
        """A full batch with shared prefixes, from arrival to the end all mixed."""
        p, d, u = links
        prompts = [prompt(40) + prompt(5 + n, n) for n in range(8)]
        reserved = []
        for n, tokens in enumerate(prompts):
            reserved.append(reserve(d, f"m{n}", tokens))
            prefill(p, d, reserved[-1], tokens)
        outputs = []
        for n in range(len(prompts)):
            first = p.expect(FirstToken, transfer_id=f"m{n}")
            outputs.append([first.token_id, *finish(d, f"m{n}")[0]])
        assert outputs == [run_local(u, f"mu{n}", tokens)[0] for n, tokens in enumerate(prompts)]

    def test_a_replay_on_another_worker_continues_the_text(self, links: list[Link]) -> None:
        p, d, u = links
        tokens = prompt(50, 6)
        whole, _ = run_local(u, "whole", tokens)
        replay = [*tokens, *whole[:5]]
        rest, reason = run_disaggregated(p, d, "replay", replay, 3, num_prompt_tokens=50)
        assert (whole[:5] + rest, reason) == (whole, "length")


class TestMessages:
    """Whatever arrives, the worker goes on."""

    def test_hello_is_answered_by_who_is_there(self, links: list[Link], system: list[WorkerProcess]) -> None:
        for link, worker, role in zip(links, system, ("prefill", "decode", "unified"), strict=True):
            welcome = link.welcome
            assert (welcome.role, welcome.worker_id, welcome.state) == (role, f"{role}-0", "ready")
            assert welcome.rank_pids == [welcome.pid] == [worker.process.pid] == [worker.ready["pid"]]
            assert welcome.peer_address == worker.control
            assert welcome.metrics_url == f"{worker.http}/metrics"
            assert link.expect(SummarySnapshot).last

    def test_bad_messages_are_counted_and_change_nothing(self, links: list[Link]) -> None:
        p, d, _ = links
        for link in (p, d):
            before = metric(link.worker, "disagg_worker_malformed_messages_total")
            for frames in ((b"",), (b"\xff\x00",), (b"a", b"b", b"c"), (b"\x93\xa7reserve\x01\x02",)):
                link.send_raw(*frames)
            wanted = before + 4
            eventually(
                lambda link=link, wanted=wanted: (
                    metric(link.worker, "disagg_worker_malformed_messages_total") == wanted
                ),
                "four malformed messages are counted",
            )
        d.send(Reserve("empty", 0, TTL_S, [], 0, greedy()))
        d.send(Generate("high", 0, TTL_S, [1, 10**6], 2, greedy()))
        d.send(Generate("long", 0, TTL_S, [1] * 600, 600, greedy()))
        for transfer_id in ("empty", "high", "long"):
            assert d.expect(Rejected, transfer_id=transfer_id).reason == "too_long"
        assert run_disaggregated(p, d, "after", prompt(20)) == run_local(links[2], "u", prompt(20))

    def test_another_protocol_version_is_refused_by_name(self, links: list[Link]) -> None:
        d = links[1]
        d.send(Hello(99, "from the future", TTL_S))
        assert "version" in d.expect(Goodbye).reason

    def test_messages_before_hello_are_dropped(self, system: list[WorkerProcess], links: list[Link]) -> None:
        before = metric(system[1], "disagg_worker_malformed_messages_total")
        with zmq.Context() as context, context.socket(zmq.DEALER) as socket:
            socket.connect(system[1].control)
            socket.send(encode(Generate("hasty", 0, TTL_S, [1, 2, 3], 3, greedy())))
            eventually(
                lambda: metric(system[1], "disagg_worker_malformed_messages_total") == before + 1, "counted"
            )

    def test_stale_generations_are_dropped(self, links: list[Link]) -> None:
        d = links[1]
        reserve(d, "s", prompt(20), 5)
        for generation in (4, 5):
            d.send(Generate("s", generation, TTL_S, prompt(20), 20, greedy()))
        d.send(Generate("next", 0, TTL_S, prompt(20), 20, greedy()))
        d.expect(Accepted, transfer_id="next")
        assert d.find(Accepted, transfer_id="s") is None

    def test_two_routers_do_not_meet(self, links: list[Link], system: list[WorkerProcess]) -> None:
        p, d, u = links
        with Router(*system, router_id="the other") as other:
            tokens, others = prompt(60, 1), prompt(60, 2)
            mine, theirs = reserve(d, "mine", tokens), reserve(other.links[1], "theirs", others)
            prefill(p, d, mine, tokens)
            prefill(other.links[0], other.links[1], theirs, others)
            got = finish(d, "mine")[0], finish(other.links[1], "theirs")[0]
            assert got == (run_local(u, "a", tokens)[0][1:], run_local(u, "b", others)[0][1:])
            assert not d.tokens("theirs")
            assert p.find(FirstToken, transfer_id="theirs") is None


def metric(worker: WorkerProcess, name: str) -> float:
    text = urllib.request.urlopen(f"{worker.http}/metrics").read().decode()
    return sum(float(line.rpartition(" ")[2]) for line in text.splitlines() if line.startswith(name + "{"))


def status(url: str, method: str = "GET") -> tuple[int, bytes]:
    try:
        with urllib.request.urlopen(urllib.request.Request(url, method=method)) as answer:
            return answer.status, answer.read()
    except urllib.error.HTTPError as error:
        return error.code, error.read()


def test_http_port(system: list[WorkerProcess], links: list[Link]) -> None:
    run_disaggregated(links[0], links[1], "http", prompt(20))
    for worker, role in zip(system, ("prefill", "decode", "unified"), strict=True):
        assert status(f"{worker.http}/health") == (200, b'{"state":"ready"}')
        assert status(f"{worker.http}/live")[0] == 200
        text = status(f"{worker.http}/metrics")[1].decode()
        labels = f'model_name="{worker.config.model.model}",pod="{role}-0",role="{role}"'
        assert f"vllm:num_requests_running{{{labels}}} 0.0" in text
        assert f'vllm:cache_config_info{{block_size="4",{labels.split(",")[0]},num_gpu_blocks="' in text
    assert metric(system[0], "disagg_worker_kv_bytes_total") > 0


def test_progress_is_told_before_ready(system: list[WorkerProcess]) -> None:
    events = system[0].events
    assert [event["event"] for event in events] == ["progress"] * (len(events) - 1) + ["ready"]
    assert events[-2]["done"] == events[-2]["total"] > 0
    ready = events[-1]
    assert ready["http"] == f"http://127.0.0.1:{ready['port']}"


def test_idle_workers_cost_nothing(system: list[WorkerProcess], links: list[Link]) -> None:
    """Also just after a transfer, with routers connected and renewing."""
    p, d, _ = links
    run_disaggregated(p, d, "idle", prompt(20))
    for link in links:
        link.assert_balanced()
    time.sleep(1.5)  # the sender lingers for a second
    before, since = [worker.cpu_s() for worker in system], time.monotonic()
    time.sleep(4)
    spent = [
        (worker.cpu_s() - cpu_s) / (time.monotonic() - since)
        for worker, cpu_s in zip(system, before, strict=True)
    ]
    assert max(spent) < 0.02, spent


class TestAborts:
    """An abort in any state leaves every page free or cached; the fixture checks it."""

    def test_reserved(self, links: list[Link]) -> None:
        d = links[1]
        reserve(d, "r", prompt(100))
        d.send(Abort("r", 0))
        d.send(Fenced("r", 0))
        d.assert_balanced(5)

    def test_reserved_and_nobody_says_fenced(self, links: list[Link]) -> None:
        """The decode worker asks every prefill worker that it knows."""
        p, d, _ = links
        run_disaggregated(p, d, "first", prompt(20))
        reserve(d, "r", prompt(100))
        d.send(Abort("r", 0))
        d.assert_balanced(5)

    @pytest.mark.parametrize("until", ["queued", "computing", "first token", "kv received", "decoding"])
    def test_at(self, links: list[Link], until: str) -> None:
        p, d, u = links
        tokens = prompt(400, hash(until) % 100)
        reserved = reserve(d, "a", tokens, sampling=greedy(60))
        prefill(p, d, reserved, tokens, sampling=greedy(60))
        match until:
            case "computing":
                p.expect(Accepted)
            case "first token":
                p.expect(FirstToken)
            case "kv received":
                d.expect(KvReceived)
            case "decoding":
                eventually(lambda: d.pump(0.01) or d.tokens("a"), "a token")
        for link in (p, d):
            link.send(Abort("a", 0))
        p.expect(Fenced, transfer_id="a")
        d.send(Fenced("a", 0))
        for link in (p, d):
            link.assert_balanced(10)
        # And the pages hold what they should for the next.
        assert run_disaggregated(p, d, "b", tokens) == run_local(u, "c", tokens)

    def test_local(self, links: list[Link]) -> None:
        u = links[2]
        u.send(Generate("a", 0, TTL_S, prompt(100), 100, greedy(300)))
        eventually(lambda: u.pump(0.01) or u.tokens("a"), "a token")
        u.send(Abort("a", 0))
        u.assert_balanced(5)
        assert u.tokens("a")[-1].finish_reason is None


class TestLeases:
    """A router that is gone holds nothing for long."""

    def test_a_silent_routers_leases_expire(self, links: list[Link]) -> None:
        p, d, _ = links
        run_disaggregated(p, d, "first", prompt(20))
        reserve(d, "r", prompt(100), ttl_s=1.0)
        d.send(Generate("g", 0, 1.0, prompt(50), 50, greedy(400)))
        d.assert_balanced(10)
        assert d.expect(Failed, transfer_id="r").reason == "expired"

    def test_renewed_leases_last(self, links: list[Link]) -> None:
        d = links[1]
        reserve(d, "r", prompt(100), ttl_s=1.0)
        d.send(Renew(30.0))
        time.sleep(2.0)
        assert d.next_load(lambda load: True).leases == 1
        d.send(Abort("r", 0))
        d.send(Fenced("r", 0))

    def test_goodbye_frees_at_once(self, links: list[Link]) -> None:
        p, d, _ = links
        tokens = prompt(100)
        prefill(p, d, reserve(d, "r", tokens), tokens)
        for link in (p, d):
            link.send(Goodbye())
            link.assert_balanced(10)


@pytest.mark.parametrize(("ptp", "dtp"), [(2, 1), (1, 2)])
def test_tensor_parallel_sizes_may_differ(
    tmp_path: Path, model: Path, system: list[WorkerProcess], ptp: int, dtp: int
) -> None:
    tokens = prompt(150, 3)
    with Router(system[2]) as unified:
        (u,) = unified.links
        expected = run_local(u, f"tp{ptp}{dtp}", tokens)
        continued = run_local(u, f"tpc{ptp}{dtp}", tokens + prompt(9, 9))
    with pair(tmp_path, model, ptp, dtp) as (p, d):
        assert (len(p.welcome.rank_pids), len(d.welcome.rank_pids)) == (ptp, dtp)
        assert p.welcome.rank_pids[0] == p.welcome.pid
        assert run_disaggregated(p, d, "a", tokens) == expected
        assert run_disaggregated(p, d, "b", tokens + prompt(9, 9)) == continued
        assert d.expect(KvReceived, transfer_id="a").bytes_received == 38 * PAGE_BYTES
        # Aborted between two chunks: both ranks fence, both sides balance.
        long = prompt(400, 5)
        prefill(p, d, reserve(d, "c", long), long)
        p.expect(Accepted, transfer_id="c")
        for link in (p, d):
            link.send(Abort("c", 0))
        p.expect(Fenced, transfer_id="c")
        for link in (p, d):
            link.assert_balanced(10)
        workers = [p.worker, d.worker]
        time.sleep(1.5)
        before = [worker.cpu_s() for worker in workers]
        time.sleep(3)
        assert max(w.cpu_s() - c for w, c in zip(workers, before, strict=True)) < 0.1
        assert [worker.terminate() for worker in workers] == [0, 0]


class TestDeath:
    """kill -9 of either side, of a rank, and of the parent."""

    def test_of_each_side(self, tmp_path: Path, model: Path, system: list[WorkerProcess]) -> None:
        tokens = prompt(300, 8)
        with Router(system[2]) as unified:
            expected = run_local(unified.links[0], "death", tokens)
        p0 = make_config(tmp_path, model, "prefill", "prefill-0")
        d0 = make_config(tmp_path, model, "decode", "decode-0")
        with running_workers(tmp_path, p0, d0) as (p, d), Router(p, d) as router:
            prefill_link, decode_link = router.links
            prefill(prefill_link, decode_link, reserve(decode_link, "a", tokens), tokens)
            prefill_link.expect(Accepted)
            p.kill()
            decode_link.send(Abort("a", 0))
            # Nobody says Fenced any more: its end is looked up.
            decode_link.assert_balanced(10)
            again = start_worker(p0, tmp_path).wait_ready()
            try:
                link = router.connect(again)
                assert run_disaggregated(link, decode_link, "b", tokens) == expected

                reserved = reserve(decode_link, "c", prompt(400, 9))
                # Stopped, it answers no write: some are under way when it is killed, however fast they are.
                d.process.send_signal(signal.SIGSTOP)
                prefill(link, decode_link, reserved, prompt(400, 9))
                link.expect(FirstToken, transfer_id="c")
                d.kill()
                assert not link.expect(Failed, 10, transfer_id="c").reason.startswith("rank")
                link.expect(Fenced, 10, transfer_id="c") if not link.expect(
                    Failed, transfer_id="c"
                ).fenced else None
                link.assert_balanced(10)
                third = start_worker(d0, tmp_path).wait_ready()
                try:
                    assert run_disaggregated(link, router.connect(third), "d", tokens) == expected
                finally:
                    third.close()
            finally:
                again.close()

    def test_of_a_rank_ends_its_worker(self, tmp_path: Path, model: Path) -> None:
        with running_workers(tmp_path, make_config(tmp_path, model, "decode", "decode-0", 2)) as (d,):
            tree = d.tree()
            with Router(d) as router:
                (link,) = router.links
                link.send(Generate("g", 0, TTL_S, prompt(50), 50, greedy(400)))
                link.expect(Accepted)
                os.kill(link.welcome.rank_pids[1], signal.SIGKILL)
                since = time.monotonic()
                assert d.process.wait(5) == 1
                assert time.monotonic() - since < 2.0
            assert not psutil.wait_procs(tree, timeout=2)[1]

    def test_of_rank_0_takes_its_ranks_along(self, tmp_path: Path, model: Path) -> None:
        with running_workers(tmp_path, make_config(tmp_path, model, "decode", "decode-0", 2)) as (d,):
            tree = d.tree()
            assert len(tree) == 2
            d.kill()
            assert not psutil.wait_procs(tree, timeout=5)[1]


class TestDrain:
    """SIGTERM and POST /drain: what runs ends, what is new is refused."""

    def test_sigterm_lets_running_requests_end(
        self, tmp_path: Path, model: Path, system: list[WorkerProcess]
    ) -> None:
        tokens = prompt(60, 11)
        with Router(system[2]) as unified:
            expected = run_local(unified.links[0], "drain", tokens, sampling=greedy(200))
        with (
            running_workers(tmp_path, make_config(tmp_path, model, "decode", "decode-0")) as (d,),
            Router(d) as router,
        ):
            (link,) = router.links
            link.send(Generate("g", 0, TTL_S, tokens, 60, greedy(200)))
            eventually(lambda: link.pump(0.01) or link.tokens("g"), "a token")
            d.process.send_signal(signal.SIGTERM)
            link.next_load(lambda load: load.state == "draining")
            assert status(f"{d.http}/health")[0] == 503
            assert status(f"{d.http}/live")[0] == 200
            link.send(Generate("new", 0, TTL_S, tokens, 60, greedy()))
            assert link.expect(Rejected).reason == "draining"
            assert finish(link, "g") == expected
            assert link.expect(Goodbye).reason == "drained"
            assert d.process.wait(10) == 0

    def test_a_second_signal_ends_at_once(self, tmp_path: Path, model: Path) -> None:
        with (
            running_workers(tmp_path, make_config(tmp_path, model, "decode", "decode-0", 2)) as (d,),
            Router(d) as router,
        ):
            (link,) = router.links
            tree = d.tree()
            reserve(link, "r", prompt(60))
            d.process.send_signal(signal.SIGTERM)
            link.next_load(lambda load: load.state == "draining")
            d.process.send_signal(signal.SIGTERM)
            assert d.process.wait(3) == 130
            assert not psutil.wait_procs(tree, timeout=3)[1]

    def test_drain_answers_when_leases_are_gone_or_time_is_up(self, tmp_path: Path, model: Path) -> None:
        config = make_config(tmp_path, model, "decode", "decode-0", drain_seconds=1.0)
        with running_workers(tmp_path, config) as (d,), Router(d) as router:
            (link,) = router.links
            reserve(link, "r", prompt(60))
            assert json.loads(status(f"{d.http}/drain", "POST")[1]) == {"leases": 1}
            link.send(Abort("r", 0))
            link.send(Fenced("r", 0))
            link.assert_balanced(5)
            assert d.terminate(5) == 0


class TestStart:
    """What cannot work is said in one sentence."""

    @pytest.mark.parametrize(
        ("changes", "words"),
        [
            ({"tensor_parallel_size": 4}, "1, 2, 3"),
            ({"model": "/nowhere/at/all"}, "/nowhere/at/all"),
            ({"kv_cache_memory_bytes": 100}, "kv_cache_memory_bytes"),
            ({"control": "tcp://0.0.0.0:0"}, "loopback"),
            ({"control": "ipc:///nowhere/at/all.sock"}, "control cannot be bound"),
            ({"http_host": "203.0.113.1"}, "http_port"),
        ],
    )
    def test_of_a_wrong_configuration(
        self, tmp_path: Path, model: Path, changes: dict[str, object], words: str
    ) -> None:
        """In this process: nothing may be left behind in it either."""
        threads = threading.active_count()
        with pytest.raises(ConfigError, match=words):
            run_worker(
                make_config(tmp_path, model, "decode", "decode-0", **changes), ready=lambda event: None
            )
        eventually(lambda: threading.active_count() <= threads, threading.enumerate)

    def test_ends_in_a_sentence_and_status_2(self, tmp_path: Path) -> None:
        worker = start_worker(make_config(tmp_path, Path("/nowhere"), "decode", "decode-0"), tmp_path)
        try:
            assert worker.process.wait(120) == 2
            log = (tmp_path / "decode-0.log").read_text()
            assert log.count("\n") == 1
            assert "/nowhere" in log
        finally:
            worker.close()
