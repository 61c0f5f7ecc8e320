"""What a worker does with each message: services of a prefill and a decode worker, without processes."""

from collections.abc import Iterator

import pytest

from disagg.protocol import (
    Abort,
    Accepted,
    Failed,
    Fenced,
    FirstToken,
    Goodbye,
    KvReceived,
    Load,
    PeerBye,
    PeerFence,
    PeerFenced,
    PeerHello,
    PrefillDone,
    Rejected,
    Release,
    Renew,
    Reserved,
    SnapshotRequest,
    SummaryDelta,
    SummaryDigest,
    SummarySnapshot,
    Tokens,
)
from disagg.transfer.mover import AWAIT_POLL_S
from disagg.worker.targets import OPEN_TIMEOUT_S
from support.worker_nodes import (
    PAGE_SIZE,
    TTL_S,
    Net,
    Node,
    begin,
    expected_output,
    generate,
    greedy,
    make_prompt,
    prefill,
    reserve,
    run_disaggregated,
)

PROMPT = make_prompt(18)
NUM_PAGES = 5  # of PROMPT


@pytest.fixture
def net() -> Net:
    return Net()


@pytest.fixture
def p(net: Net) -> Node:
    return net.add("p0", "prefill")


@pytest.fixture
def d(net: Net) -> Node:
    return net.add("d0", "decode", pids=((2, 2),))


@pytest.fixture(autouse=True)
def _nothing_is_left(net: Net) -> Iterator[None]:
    """After each test every worker that still lives balances, given time and a router's silence."""
    yield
    net.fabric.hold_writes = False
    while net.fabric.writes:
        net.fabric.land()
    for node in net.nodes.values():
        node.is_paused = False
    net.advance(TTL_S + 3)
    for node in net.nodes.values():
        node.assert_balanced()


# --- the way of a request -----------------------------------------------------------------------


def test_output_through_two_workers_is_that_of_one(net: Net, p: Node, d: Node) -> None:
    tokens, reason = run_disaggregated(net, p, d, PROMPT)
    assert tokens == expected_output(PROMPT)
    d.ask(generate(PROMPT, "local"))
    net.settle()
    assert d.output("local") == (tokens, reason)


def test_messages_come_in_the_order_of_the_protocol(net: Net, p: Node, d: Node) -> None:
    run_disaggregated(net, p, d, PROMPT)
    assert p.heard() == ["Accepted", "FirstToken", "PrefillDone"]
    assert d.heard()[:3] == ["Reserved", "KvReceived", "Tokens"]
    assert set(d.heard()[3:]) == {"Tokens"}


def test_every_byte_is_accounted_for(net: Net, p: Node, d: Node) -> None:
    run_disaggregated(net, p, d, PROMPT)
    (done,), (received,) = p.find(PrefillDone), d.find(KvReceived)
    assert done.num_bytes == received.bytes_expected == received.bytes_received == NUM_PAGES * PAGE_SIZE * 8
    assert done.num_pages == received.num_pages == NUM_PAGES


def test_only_missing_pages_move(net: Net, p: Node, d: Node) -> None:
    """Both prefix caches are warm the second time: one page of five is computed again and moved."""
    run_disaggregated(net, p, d, PROMPT, "a")
    tokens, _ = run_disaggregated(net, p, d, PROMPT, "b")
    assert tokens == expected_output(PROMPT)
    assert p.find(PrefillDone)[1].num_pages == 1
    assert d.find(Reserved)[1].cached_tokens == 16
    assert p.find(Accepted)[1].cached_tokens == p.find(FirstToken)[1].cached_tokens == 16


def test_a_prompt_cached_whole_moves_no_page_and_still_decodes(net: Net, p: Node, d: Node) -> None:
    """Without `cap_match` a prompt of whole pages can be there already; only the token is sent."""
    prompt = make_prompt(16)
    run_disaggregated(net, p, d, prompt, "a")
    d.ask(reserve(prompt, "b", cap_match=False))
    net.settle()
    reserved = d.find(Reserved)[1]
    assert reserved.first_missing_page == 4
    p.ask(prefill(prompt, reserved, d))
    net.settle()
    assert p.find(PrefillDone)[1].num_bytes == 0
    assert d.output("b")[0] == expected_output(prompt)[1:]


def test_first_token_does_not_wait_for_kv(net: Net, p: Node, d: Node) -> None:
    net.fabric.hold_writes = True
    begin(net, p, d, PROMPT)
    net.settle()
    assert p.find(FirstToken)[0].token_id == expected_output(PROMPT)[0]
    assert p.find(PrefillDone) == d.find(KvReceived) == []


def test_chunks_are_pushed_while_the_next_one_computes(net: Net, p: Node, d: Node) -> None:
    """A prompt of four chunks: what one has made complete is under way before the next has run."""
    prompt = make_prompt(58)
    run_disaggregated(net, p, d, make_prompt(4, 9), "warm", sampling=greedy(1))  # the two have met
    net.fabric.hold_writes = True
    begin(net, p, d, prompt, sampling=greedy(4))
    num_writes = []
    while not p.find(FirstToken, transfer_id="t"):
        net.turn()
        num_writes.append(len(net.fabric.writes))
    assert num_writes == [0, 1, 2, 3]  # each posted beside the next step
    net.settle()
    while net.fabric.writes:
        net.fabric.land(-1)  # and in any order
    net.settle()
    assert d.output("t")[0] == expected_output(prompt, 4)[1:]


def test_a_request_that_ends_with_its_first_token_is_not_decoded(net: Net, p: Node, d: Node) -> None:
    tokens, reason = run_disaggregated(net, p, d, PROMPT, sampling=greedy(1))
    assert (tokens, reason) == (expected_output(PROMPT, 1), "length")
    assert d.heard() == ["Reserved", "KvReceived"]


def test_one_message_a_step_and_router(net: Net, d: Node) -> None:
    for number in range(3):
        d.ask(generate(make_prompt(4, number), f"a{number}"), "r0")
    d.ask(generate(make_prompt(4, 9), "b"), "r1")
    net.settle()
    first, *rest = d.find(Tokens, "r0")
    assert len(first.sequences) == 3
    assert len(rest) == 7
    assert all(len(message.sequences) == 1 for message in d.find(Tokens, "r1"))


def test_ranks_poll_exactly_while_kv_may_arrive(net: Net, p: Node, d: Node) -> None:
    """Too seldom and nothing lands, for ever and an idle worker burns a core."""
    mover = d.port.mover
    assert mover.wait_s() is None
    d.ask(reserve(PROMPT, "a"))
    d.ask(reserve(PROMPT, "b"))
    net.settle()
    assert mover.wait_s() == AWAIT_POLL_S
    d.ask(Abort("a", 0))
    net.advance(1)
    assert mover.wait_s() == AWAIT_POLL_S
    p.ask(prefill(PROMPT, d.find(Reserved, transfer_id="b")[0], d))
    net.settle()
    assert d.output("b")[1] == "length"
    assert mover.wait_s() is None


def test_a_replay_continues_where_it_was(net: Net, p: Node, d: Node) -> None:
    """Positions and max_tokens count from the end of the original prompt."""
    whole = expected_output(PROMPT)
    replay = [*PROMPT, *whole[:3]]
    reserved = begin(net, p, d, replay, generation=1, num_prompt_tokens=len(PROMPT))
    net.settle()
    first = p.find(FirstToken)[0]
    assert (first.position, first.token_id) == (3, whole[3])
    assert reserved.generation == 1
    assert d.output("t", 1)[0] == whole[4:]


def test_two_workers_that_disagree_about_the_end_leave_no_client_waiting(net: Net, p: Node, d: Node) -> None:
    """Decode would keep silent for ever: it has nothing to compute, only an end to tell."""
    first = expected_output(PROMPT)[0]
    d.ask(reserve(PROMPT, sampling=greedy(stop_token_ids=(first,))))
    net.settle()
    p.ask(prefill(PROMPT, d.find(Reserved)[0], d))
    net.settle()
    assert d.output("t") == ([], "stop")


def test_out_of_pages_the_youngest_is_handed_back(net: Net) -> None:
    small = net.add("d1", "decode", num_pages=8, max_model_len=30)
    for name in ("old", "young"):
        small.ask(generate(make_prompt(8, 1 if name == "old" else 2), name, sampling=greedy(16)))
    net.settle()
    assert small.output("old")[1] == "length"
    assert small.output("young")[1] == "handed_back"
    small.assert_balanced()


# --- refusals -----------------------------------------------------------------------------------


def test_stale_and_repeated_messages_are_dropped(net: Net, d: Node) -> None:
    d.ask(reserve(PROMPT, generation=2))
    d.ask(reserve(PROMPT, generation=2))
    d.ask(reserve(PROMPT, generation=1))
    d.ask(generate(PROMPT, generation=0))
    net.settle()
    assert d.heard() == ["Reserved"]
    assert d.load.leases == 1
    assert d.counts.stale_messages == 3


def test_of_a_rejected_attempt_only_its_generation_is_remembered(net: Net, d: Node) -> None:
    d.ask(reserve(make_prompt(80), generation=1))
    net.settle()
    assert d.heard() == ["Rejected"]
    d.assert_balanced()
    d.ask(reserve(PROMPT, generation=1))
    for generation in (1, 0):
        d.ask(Abort("t", generation))
        d.ask(Release("t", generation))
    d.ask(reserve(PROMPT, generation=2))
    net.settle()
    assert d.heard() == ["Rejected", "Reserved"]
    assert d.load.leases == 1


def test_an_attempt_aborted_before_it_came_is_not_begun(net: Net, p: Node, d: Node) -> None:
    """A slow link may bring the Abort of one router's retry before the attempt itself."""
    d.ask(Abort("t", 3))
    d.ask(generate(PROMPT, generation=3))
    net.settle()
    assert d.heard() == []


def test_a_newer_generation_ends_the_older_one(net: Net, d: Node) -> None:
    d.ask(generate(PROMPT, generation=0, sampling=greedy(40)))
    net.turn()
    d.ask(generate(PROMPT, generation=1))
    net.settle()
    assert d.output("t", 1)[0] == expected_output(PROMPT)
    assert d.output("t", 0)[1] is None


def test_what_does_not_fit_is_rejected_and_holds_nothing(net: Net, p: Node, d: Node) -> None:
    d.ask(reserve(make_prompt(80), "long"))
    d.ask(generate([], "empty", num_prompt_tokens=0))
    d.ask(generate([1, VOCAB_TOO_HIGH, 2], "vocab"))
    for number in range(4):
        d.ask(reserve(make_prompt(38, number), f"many{number}"))  # 11 of 32 pages each
    net.settle()
    reasons = {message.transfer_id: message.reason for message in d.find(Rejected)}
    never, later = (
        dict.fromkeys(("long", "empty", "vocab"), "too_long"),
        dict.fromkeys(("many2", "many3"), "no_pages"),
    )
    assert reasons == never | later
    assert d.load.leases == 2


VOCAB_TOO_HIGH = 2**40  # nor does it fit the arrays that tokens are kept in


def test_a_target_whose_pages_do_not_match_the_prompt_is_rejected(net: Net, p: Node, d: Node) -> None:
    d.ask(reserve(PROMPT))
    net.settle()
    reserved = d.find(Reserved)[0]
    p.ask(prefill([*PROMPT, 1, 2, 3], reserved, d))
    net.settle()
    assert p.find(Rejected)[0].reason == "layout_mismatch"


def test_page_ids_outside_the_targets_pool_never_become_addresses(net: Net, p: Node, d: Node) -> None:
    d.ask(reserve(PROMPT))
    net.settle()
    reserved = d.find(Reserved)[0]
    lie = Reserved(reserved.transfer_id, 0, 0, [0, 1, 2, 3, 10_000], 0)
    p.ask(prefill(PROMPT, lie, d))
    net.settle()
    assert "10000" in p.find(Failed)[0].reason


def test_draining_refuses_new_work_and_finishes_what_runs(net: Net, d: Node) -> None:
    d.ask(generate(PROMPT, "old", sampling=greedy(30)))
    net.turn()
    d.post(d.service.begin_drain)
    d.ask(generate(PROMPT, "new"))
    d.ask(reserve(PROMPT, "new2"))
    net.turn()
    assert d.reports[-1].num_held == 1
    net.settle()
    assert {r.transfer_id: r.reason for r in d.find(Rejected)} == {"new": "draining", "new2": "draining"}
    assert d.output("old")[0] == expected_output(PROMPT, 30)
    assert (d.reports[-1].load.state, d.reports[-1].num_held) == ("draining", 0)


# --- aborts in every state ----------------------------------------------------------------------


def test_abort_of_a_queued_prefill_is_fenced_at_once(net: Net, p: Node, d: Node) -> None:
    begin(net, p, d, PROMPT)
    p.ask(Abort("t", 0))
    d.ask(Abort("t", 0))
    net.settle()
    assert p.find(Fenced) == [Fenced("t", 0)]
    assert p.find(FirstToken) == []
    net.advance(1)
    d.assert_balanced()
    p.assert_balanced()


def test_abort_between_chunks_stops_within_a_step(net: Net, p: Node, d: Node) -> None:
    begin(net, p, d, make_prompt(40))
    net.turn()
    assert len(p.runner.plans) == 1
    p.ask(Abort("t", 0))
    net.settle()
    assert len(p.runner.plans) == 1
    assert p.find(Fenced)


def test_aborted_pages_are_kept_until_the_writer_is_fenced(net: Net, p: Node, d: Node) -> None:
    """The GPU of another machine may still be writing into them, whatever generation is current."""
    net.fabric.hold_writes = True
    begin(net, p, d, PROMPT)
    net.settle()
    d.ask(Abort("t", 0))
    p.ask(Abort("t", 0))
    net.advance(5)
    assert d.load.pages_in_use == NUM_PAGES
    assert p.load.pages_in_use == NUM_PAGES  # the write reads from them
    assert p.find(Fenced) == []
    while net.fabric.writes:
        net.fabric.land()
    net.advance(1)
    assert p.find(Fenced) == [Fenced("t", 0)]
    d.assert_balanced()
    p.assert_balanced()


def test_abort_of_a_decoding_sequence_frees_at_once(net: Net, p: Node, d: Node) -> None:
    begin(net, p, d, PROMPT, sampling=greedy(40))
    while not d.find(Tokens):
        net.turn()
    d.ask(Abort("t", 0))
    net.settle()
    assert d.output("t")[1] is None
    d.assert_balanced()


def test_a_decode_worker_never_answers_for_the_prefill_worker(net: Net, d: Node) -> None:
    """Fenced from it would be taken for the writer's word."""
    d.ask(reserve(PROMPT))
    net.settle()
    d.ask(Abort("t", 0))
    d.ask(Abort("unknown", 0))
    net.advance(1)
    assert d.find(Fenced) == []


def test_a_prefill_worker_answers_for_attempts_that_it_never_saw(net: Net, p: Node) -> None:
    p.ask(Abort("unknown", 0))
    net.settle()
    assert p.find(Fenced) == [Fenced("unknown", 0)]


def test_the_routers_word_fences(net: Net, p: Node, d: Node) -> None:
    """Where the decode worker's own question cannot be answered: its peer is busy for long."""
    net.fabric.hold_writes = True
    begin(net, p, d, PROMPT)
    net.settle()
    p.is_paused = True
    d.ask(Abort("t", 0))
    net.advance(3)
    assert d.load.pages_in_use == NUM_PAGES
    d.ask(Fenced("t", 0))
    net.advance(1)
    d.assert_balanced()


def test_releases_are_idempotent(net: Net, p: Node, d: Node) -> None:
    run_disaggregated(net, p, d, PROMPT)
    for _ in range(2):
        for node in (p, d):
            node.ask(Release("t", 0))
            node.ask(Release("never", 7))
    net.settle()
    d.assert_balanced()
    p.assert_balanced()


# --- silence, death, restarts -------------------------------------------------------------------


def test_a_silent_routers_leases_end(net: Net, p: Node, d: Node) -> None:
    d.ask(reserve(PROMPT, "a"), "silent")
    d.ask(reserve(PROMPT, "b"), "r0")
    net.settle()
    for _ in range(3):
        net.advance(TTL_S / 2)
        d.ask(Renew(TTL_S), "r0")
    assert d.load.leases == 1
    assert d.find(Failed, "silent")[0].reason == "expired"
    d.ask(Release("b", 0))
    net.settle()
    net.advance(1)
    d.assert_balanced()


def test_expiry_makes_up_for_a_release_that_was_lost_with_its_link(net: Net, d: Node) -> None:
    """A router says Hello under another id after each break, so its renewals keep nothing of before."""
    d.ask(reserve(PROMPT), "r.1")
    net.settle()
    d.hello("r.2")
    for _ in range(2):
        net.advance(TTL_S / 3)
        d.ask(Renew(TTL_S), "r.2")
    net.settle()
    assert d.load.leases == 1
    net.advance(TTL_S / 3 + 0.5)
    d.assert_balanced()


def test_goodbye_releases_what_a_router_holds(net: Net, p: Node, d: Node) -> None:
    d.ask(reserve(PROMPT, "a"), "r0")
    d.ask(generate(make_prompt(8), "b", sampling=greedy(40)), "r0")
    net.turn()
    d.ask(Goodbye(), "r0")
    net.settle()
    net.advance(1)
    d.assert_balanced()


def test_a_dead_prefill_workers_pages_come_back(net: Net, p: Node, d: Node) -> None:
    """Nobody will ever say Fenced; its pid is looked up, and what was under way may land first."""
    net.fabric.hold_writes = True
    begin(net, p, d, PROMPT)
    net.settle()
    net.kill(p)
    d.ask(Abort("t", 0))
    net.settle()
    assert d.load.pages_in_use == NUM_PAGES
    net.advance(2)
    d.assert_balanced()


def test_another_prefill_worker_takes_over(net: Net, p: Node, d: Node) -> None:
    net.fabric.hold_writes = True
    begin(net, p, d, PROMPT)
    net.settle()
    net.kill(p)
    net.fabric.hold_writes = False
    other = net.add("p1", "prefill", pids=((3, 3),))
    tokens, _ = run_disaggregated(net, other, d, PROMPT, generation=1)
    assert tokens == expected_output(PROMPT)
    fresh, old = d.find(Reserved, generation=1)[0], d.find(Reserved, generation=0)[0]
    assert not set(fresh.page_ids) & set(old.page_ids)


def test_a_dead_decode_workers_requests_fail_and_are_pushed_elsewhere_without_prefill(
    net: Net, p: Node, d: Node
) -> None:
    net.fabric.hold_writes = True
    begin(net, p, d, PROMPT)
    net.settle()
    net.kill(d)
    net.settle()
    assert p.find(Failed)[0].reason.startswith("link_lost:")
    assert not p.find(Failed)[0].fenced
    net.advance(2)
    assert p.find(Fenced) == [Fenced("t", 0)]
    net.fabric.hold_writes = False
    net.fabric.writes.clear()
    other = net.add("d1", "decode", pids=((3, 3),))
    num_steps = len(p.runner.plans)
    tokens, _ = run_disaggregated(net, p, other, PROMPT, generation=1)
    assert tokens == expected_output(PROMPT)
    assert p.find(Accepted)[1].cached_tokens == 16
    assert len(p.runner.plans) == num_steps + 1


def test_a_restarted_decode_worker_is_reached_anew(net: Net, p: Node, d: Node) -> None:
    """The same address and worker id, another process: the old link and its metadata are worthless."""
    run_disaggregated(net, p, d, PROMPT, "a")
    net.kill(d)
    net.links.add((p.uuid, d.uuid))  # ZeroMQ would connect it again, to whomever
    net.settle()
    assert not net.links
    again = net.add("d0", "decode", uuid="d0-again", pids=((3, 3),))
    tokens, _ = run_disaggregated(net, p, again, PROMPT, "b")
    assert tokens == expected_output(PROMPT)


def test_a_restarted_prefill_worker_fences_its_predecessor(net: Net, p: Node, d: Node) -> None:
    net.fabric.hold_writes = True
    begin(net, p, d, PROMPT, "a")
    net.settle()
    d.ask(Abort("a", 0))
    net.kill(p)
    net.dead.clear()  # its pid cannot be looked up from here
    net.advance(1)
    assert d.load.pages_in_use == NUM_PAGES
    net.fabric.hold_writes = False
    again = net.add("p0", "prefill", uuid="p0-again", pids=((3, 3),))
    run_disaggregated(net, again, d, PROMPT, "b")
    net.advance(1)
    d.assert_balanced()


def test_another_process_at_the_targets_address_gets_nothing(net: Net, p: Node, d: Node) -> None:
    begin(net, p, d, PROMPT)
    net.kill(d)
    net.add("d0", "decode", uuid="d0-again", pids=((3, 3),))
    net.settle()
    assert p.find(Failed)[0].reason.startswith("peer_lost:")
    assert not net.fabric.writes


def test_a_target_that_does_not_answer_fails_the_attempt(net: Net, p: Node, d: Node) -> None:
    net.cut.add(d.address)
    begin(net, p, d, PROMPT)
    net.advance(OPEN_TIMEOUT_S + 1)
    assert p.find(Failed)[0].reason.startswith("peer_unreachable:")
    p.assert_balanced()
    net.cut.clear()
    assert run_disaggregated(net, p, d, PROMPT, generation=1)[0] == expected_output(PROMPT)


def test_nothing_is_posted_after_the_deadline(net: Net, p: Node, d: Node) -> None:
    d.ask(reserve(PROMPT))
    net.settle()
    net.cut.add(d.address)
    p.ask(prefill(PROMPT, d.find(Reserved)[0], d, deadline_s=2.0))
    net.advance(3)
    assert p.find(Failed)[0].reason.startswith("timeout:")
    assert not net.fabric.writes


def test_other_layouts_are_refused_by_name(net: Net, p: Node) -> None:
    other = net.add("d1", "decode", pids=((3, 3),), dtype="bfloat16")
    begin(net, p, other, PROMPT)
    net.settle()
    assert p.find(Failed)[0].reason.startswith("layout_mismatch: dtype is float32 at the source")
    begin(net, p, other, PROMPT, "next")
    net.settle()
    assert p.find(Rejected)[0].reason == "layout_mismatch"


def test_no_attempt_that_ended_before_two_workers_met_is_written_for(net: Net, p: Node, d: Node) -> None:
    """An Abort may overtake the Prefill of the same attempt, for they travel on two links.

    So the fence comes before the hello that tells where the pool is.
    """
    begin(net, p, d, PROMPT)
    d.ask(Abort("t", 0))
    p.is_paused = True
    net.settle()
    net.advance(0.5)
    d.assert_balanced()
    net.fabric.hold_writes = True
    p.is_paused = False
    told = []
    p.service.on_link = lambda uuid, message, on_link=p.service.on_link: (
        told.append(type(message)),
        on_link(uuid, message),
    )
    net.settle()
    assert not net.fabric.writes
    assert told == [PeerFence, PeerHello]


def test_goodbye_of_a_drained_prefill_worker_is_its_fence(net: Net, p: Node, d: Node) -> None:
    run_disaggregated(net, p, d, PROMPT, "a")
    d.ask(reserve(make_prompt(18, 1), "b"))
    net.settle()
    p.is_paused = True
    d.ask(Abort("b", 0))
    net.settle()
    assert d.load.pages_in_use == NUM_PAGES
    p.is_paused = False
    p.inbox.clear()  # the question is lost
    p.post(p.service.say_goodbye)
    net.settle()
    net.advance(0.5)
    assert d.load.pages_in_use == 0
    assert p.find(Goodbye)


def test_goodbye_at_the_deadline_fences_nothing(net: Net, p: Node, d: Node) -> None:
    """A prefill worker that must end while its writes are under way cannot promise that none lands."""
    net.fabric.hold_writes = True
    begin(net, p, d, PROMPT)
    net.settle()
    d.ask(Abort("t", 0))
    net.settle()
    p.post(p.service.say_goodbye)
    net.advance(2)
    assert p.find(Goodbye)[0].reason == "drain deadline passed"
    assert d.load.pages_in_use == NUM_PAGES


def test_strange_messages_of_peers_change_nothing(net: Net, p: Node, d: Node) -> None:
    run_disaggregated(net, p, d, PROMPT)
    for message in (PeerFence("x", 0), PeerFenced("x", 0)):
        d.service.on_peer(p.uuid, message)
        p.service.on_link(d.uuid, message)
        d.service.on_peer("nobody", message)
        p.service.on_link("nobody", message)
    p.service.on_link("nobody", PeerBye(""))
    d.service.on_peer("nobody", PeerBye(""))
    net.settle()
    assert run_disaggregated(net, p, d, PROMPT, "next")[0] == expected_output(PROMPT)


# --- what routers are told ----------------------------------------------------------------------


def test_a_router_that_joins_late_learns_all(net: Net, d: Node) -> None:
    d.ask(generate(PROMPT))
    net.settle()
    d.hello("late")
    net.settle()
    (snapshot,) = d.find(SummarySnapshot, "late")
    assert snapshot.last
    assert len(snapshot.hashes) == 8 * (len(PROMPT + expected_output(PROMPT)) - 1) // PAGE_SIZE // 8 * 8
    assert d.find(Load, "late") or d.reports[-1].load.state == "ready"


def test_deltas_count_up_and_add_up_to_the_snapshot(net: Net, d: Node) -> None:
    for number in range(3):
        d.ask(generate(make_prompt(12, number), f"t{number}"))
        net.settle()
    deltas = d.find(SummaryDelta)
    assert [delta.seq for delta in deltas] == list(range(1, len(deltas) + 1))
    held = set()
    for delta in deltas:
        held |= {delta.stored[i : i + 8] for i in range(0, len(delta.stored), 8)}
        held -= {delta.removed[i : i + 8] for i in range(0, len(delta.removed), 8)}
    d.ask(SnapshotRequest())
    net.settle()
    snapshot = d.find(SummarySnapshot)[-1]
    assert snapshot.seq == deltas[-1].seq
    assert held == {snapshot.hashes[i : i + 8] for i in range(0, len(snapshot.hashes), 8)}


def test_a_digest_comes_every_few_seconds(net: Net, d: Node) -> None:
    d.ask(generate(PROMPT))
    net.settle()
    net.advance(11)
    digests = d.find(SummaryDigest)
    assert len(digests) == 2
    assert digests[-1].count == d.engine.cache.prefix.num_pages
    assert digests[-1].seq == d.find(SummaryDelta)[-1].seq


def test_a_load_follows_every_tick_and_the_end_of_work(net: Net, p: Node, d: Node) -> None:
    run_disaggregated(net, p, d, PROMPT)
    for node in (p, d):
        load = node.reports[-1].load
        assert (load.running, load.leases, load.pages_in_use) == (0, 0, 0)
    num_reports = len(d.reports)
    net.advance(1)
    assert len(d.reports) == num_reports + 2


def test_a_load_before_the_step_counts_what_the_step_begins_with(net: Net, d: Node) -> None:
    """A step may take seconds, in which routers would take this worker for idle."""
    d.service.on_router("r0", generate(PROMPT))
    d.service.report_changes()
    d.service.report_changes()
    d.perform()
    assert [(report.load.waiting, report.load.queued_tokens) for report in d.reports] == [(1, len(PROMPT))]


def test_a_prompt_that_lacks_pages_waits_for_what_frees_them(net: Net) -> None:
    """With nothing else to run there is no step to make until then."""
    p = net.add("small", "prefill", num_pages=8)
    d = net.add("d1", "decode")
    net.fabric.hold_writes = True
    begin(net, p, d, PROMPT, "a")
    begin(net, p, d, make_prompt(18, 1), "b")
    net.settle()
    assert p.service.has_work
    assert not p.service.step()
    net.fabric.hold_writes = False
    while net.fabric.writes:
        net.fabric.land()
    net.settle()
    for transfer_id in "ab":
        d.ask(Release(transfer_id, 0))
    net.settle()
    assert len(p.find(PrefillDone)) == 2


def test_counts_for_dashboards(net: Net, p: Node, d: Node) -> None:
    run_disaggregated(net, p, d, PROMPT)
    d.ask(generate(PROMPT, "local", sampling=greedy(30)))
    net.turn()
    d.ask(Abort("local", 0))
    net.settle()
    d.service.report()
    assert d.counts.finished == {"length": 1, "abort": 1}
    assert p.counts.sent_bytes == d.counts.received_bytes == NUM_PAGES * PAGE_SIZE * 8
    assert p.counts.ttft_s.buckets()[-1][1] == 1
    assert d.counts.itl_s.buckets()[-1][1] >= 6
