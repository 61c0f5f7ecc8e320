"""One worker whose ranks are on several nodes, each node a process tree of its own here."""

import os
import shutil
import signal
import socket
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil
import pytest

from disagg.config import WorkerConfig
from disagg.protocol import Abort, Accepted, Fenced, Generate, KvReceived
from support.checkpoints import make_checkpoint
from support.keys import KeyFolder
from support.sockets import needs_ipv6
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

NETS = {"IPv4": (f"10.213.{os.getpid() % 256}.", 30), "IPv6": (f"fd00:213:{os.getpid() % 65536:x}::", 64)}
NUM_PAGES = 38
PROMPT = [3 + (7 * i + 13 * (i % 5)) % 300 for i in range(150)]
LOST_WITHIN_S = 10.0


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("model"))


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        return int(taken.getsockname()[1])


@contextmanager
def over_nodes(
    folder: Path, model: Path, role: str, tp: int = 2, num_nodes: int = 2
) -> Iterator[list[WorkerProcess]]:
    """A worker of several nodes, its leader first. The others are there before it."""
    port = free_port()
    leader, *others = (
        make_config(
            folder,
            model,
            role,
            f"{role}-{node}",
            tp,
            num_nodes=num_nodes,
            node_rank=node,
            node_port=port,
            leader_address="127.0.0.1",
        )
        for node in range(num_nodes)
    )
    with running_workers(folder, *others, leader) as workers:
        yield [workers[-1], *workers[:-1]]


@pytest.fixture
def decode(tmp_path: Path, model: Path) -> Iterator[list[WorkerProcess]]:
    with over_nodes(tmp_path, model, "decode") as nodes:
        yield nodes


@pytest.fixture(params=["IPv4", pytest.param("IPv6", marks=needs_ipv6)])
def namespace(
    request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> Iterator[tuple[str, tuple[str, str]]]:
    """A network namespace and a host here and in it, on a wire of one family alone, which KV takes too."""
    if os.geteuid() != 0 or shutil.which("ip") is None:
        pytest.skip("network namespaces need root and iproute2")
    name = f"disagg{os.getpid()}"
    net, bits = NETS[request.param]
    hosts = (f"{net}1", f"{net}2")
    nodad = " nodad" if request.param == "IPv6" else ""
    monkeypatch.setenv("UCX_NET_DEVICES", name)  # else it may call from an address that has no way back

    def ip(command: str) -> None:
        subprocess.run(["ip", *command.split()], check=True)

    ip(f"netns add {name}")
    try:
        ip(f"link add {name} type veth peer name {name} netns {name}")
        ip(f"addr add {hosts[0]}/{bits} dev {name}{nodad}")
        ip(f"link set {name} up")
        address = f"addr add {hosts[1]}/{bits} dev {name}{nodad}"
        for command in (address, f"link set {name} up", "link set lo up"):
            ip(f"netns exec {name} ip {command}")
        yield name, hosts
    finally:
        ip(f"netns del {name}")


@contextmanager
def link_to(worker: WorkerProcess) -> Iterator[Link]:
    with Router(worker) as router:
        yield router.links[0]


@pytest.mark.parametrize(("tp", "num_nodes"), [(2, 2), (3, 3)])
def test_a_worker_over_nodes_says_what_one_process_says(
    tmp_path: Path, model: Path, tp: int, num_nodes: int
) -> None:
    """Both ways: it is pushed to by one process, and pushes to one."""
    others = [make_config(tmp_path, model, role, f"{role}-one") for role in ("prefill", "unified")]
    with (
        over_nodes(tmp_path, model, "decode", tp, num_nodes) as nodes,
        running_workers(tmp_path, *others) as (p, u),
        Router(p, nodes[0], u) as router,
    ):
        prefill_link, decode_link, unified_link = router.links
        expected = run_local(unified_link, "u", PROMPT)
        assert run_disaggregated(prefill_link, decode_link, "a", PROMPT) == expected
        done = decode_link.expect(KvReceived, transfer_id="a")
        assert done.num_pages == NUM_PAGES
        assert done.bytes_received == done.bytes_expected
        pids = decode_link.welcome.rank_pids
        assert pids[0] == nodes[0].process.pid
        for node, pid in zip(nodes[1:], pids[1:], strict=True):
            assert psutil.Process(pid).ppid() == node.process.pid
        long = PROMPT * 2
        prefill(prefill_link, decode_link, reserve(decode_link, "c", long), long)
        prefill_link.expect(Accepted, transfer_id="c")
        for link in (prefill_link, decode_link):
            link.send(Abort("c", 0))
        prefill_link.expect(Fenced, transfer_id="c")
        for link in (prefill_link, decode_link):
            link.assert_balanced()


def test_prefill_over_nodes_pushes_from_each(tmp_path: Path, model: Path) -> None:
    other = make_config(tmp_path, model, "decode", "decode-one")
    with (
        over_nodes(tmp_path, model, "prefill") as nodes,
        running_workers(tmp_path, other) as (d,),
        Router(nodes[0], d) as router,
    ):
        p_link, d_link = router.links
        expected = run_local(d_link, "u", PROMPT)
        assert run_disaggregated(p_link, d_link, "a", PROMPT + PROMPT)[0] != expected[0]
        assert run_disaggregated(p_link, d_link, "b", PROMPT) == expected


def test_a_lost_node_ends_the_worker(decode: list[WorkerProcess]) -> None:
    leader, node = decode
    tree = leader.tree() + node.tree()
    with link_to(leader) as link:
        link.send(Generate("g", 0, TTL_S, PROMPT, len(PROMPT), greedy(400, ignore_eos=True)))
        link.expect(Accepted)
        node.kill()
        assert leader.process.wait(LOST_WITHIN_S) == 1
    assert not psutil.wait_procs(tree, timeout=5)[1]


def test_a_lost_leader_ends_the_nodes(decode: list[WorkerProcess]) -> None:
    leader, node = decode
    tree = leader.tree() + node.tree()
    leader.kill()
    assert node.process.wait(LOST_WITHIN_S) == 1
    assert not psutil.wait_procs(tree, timeout=5)[1]


def test_a_dead_rank_of_another_node_ends_the_worker(decode: list[WorkerProcess]) -> None:
    leader, node = decode
    with link_to(leader) as link:
        psutil.Process(link.welcome.rank_pids[1]).kill()
        assert leader.process.wait(LOST_WITHIN_S) == 1
    assert node.process.wait(LOST_WITHIN_S) in (0, 1)


@pytest.mark.parametrize("which", [0, 1])
def test_sigterm_of_any_node_drains_the_worker(decode: list[WorkerProcess], which: int) -> None:
    """A node that is to go takes the worker with it, and what runs ends before."""
    with link_to(decode[0]) as link:
        link.send(Generate("g", 0, TTL_S, PROMPT, len(PROMPT), greedy(60, ignore_eos=True)))
        link.expect(Accepted)
        decode[which].process.send_signal(signal.SIGTERM)
        tokens, reason = finish(link, "g")
        assert (len(tokens), reason) == (60, "length")
    assert [node.process.wait(30) for node in decode] == [0, 0]


def test_a_node_that_does_not_fit_is_refused_by_name(
    decode: list[WorkerProcess], tmp_path: Path, model: Path
) -> None:
    port = decode[0].config.nodes.node_port
    for number, (changes, reason) in enumerate(
        (
            ({"num_nodes": 3, "node_rank": 1}, "num_nodes is 2 here, 3 there"),
            ({"num_nodes": 2, "node_rank": 1}, "node 1 has joined before"),
        )
    ):
        config = make_config(
            tmp_path,
            model,
            "decode",
            f"wrong-{number}",
            node_port=port,
            leader_address="127.0.0.1",
            **changes,
        )
        wrong = start_worker(config, tmp_path)
        try:
            assert wrong.process.wait(30) == 2
        finally:
            wrong.close()
        assert reason in (tmp_path / f"wrong-{number}.log").read_text()
    with link_to(decode[0]) as link:
        assert run_local(link, "u", PROMPT)[1] == "stop"


def test_nodes_of_two_network_namespaces_meet_with_the_release_s_key_alone(
    tmp_path: Path, model: Path, namespace: tuple[str, tuple[str, str]]
) -> None:
    there, hosts = namespace
    keys = KeyFolder(tmp_path / "keys", current="release")
    others = KeyFolder(tmp_path / "other-keys", current="other")
    port = free_port()

    def node(name: str, rank: int, folder: KeyFolder) -> WorkerConfig:
        return make_config(
            tmp_path,
            model,
            "decode",
            name,
            2,
            num_nodes=2,
            node_rank=rank,
            node_port=port,
            leader_address=hosts[0],
            advertise_host=hosts[rank],
            transport_keys=str(folder.path),
        )

    prefill_config = make_config(
        tmp_path, model, "prefill", "p", advertise_host=hosts[0], transport_keys=str(keys.path)
    )
    leader = start_worker(node("leader", 0, keys), tmp_path)
    stranger = start_worker(node("stranger", 1, others), tmp_path, there)
    try:
        log = tmp_path / "stranger.log"
        eventually(lambda: "the leader refused the handshake" in log.read_text(), log.read_text, 60)
        assert "node joined" not in (tmp_path / "leader.log").read_text()
        stranger.process.kill()
        member = start_worker(node("member", 1, keys), tmp_path, there)
        try:
            with running_workers(tmp_path, prefill_config) as (p,), Router(p, leader.wait_ready()) as router:
                expected = run_local(router.links[1], "u", PROMPT)
                text = [3 + token % 300 for token in reversed(PROMPT)]
                assert len(run_disaggregated(*router.links, "a", text)[0]) > 1
                assert router.links[1].expect(KvReceived, transfer_id="a").num_pages == NUM_PAGES
                assert run_disaggregated(*router.links, "b", PROMPT) == expected
            assert leader.terminate() == 0
            assert member.process.wait(10) == 0
        finally:
            member.close()
    finally:
        stranger.close()
        leader.close()
        for name in ("leader", "stranger", "member"):
            if (tmp_path / f"{name}.log").exists():
                print((tmp_path / f"{name}.log").read_text())
