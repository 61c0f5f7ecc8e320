"""Random requests, aborts, reservations and steps over small pools, every page accounted for.

The fake runner's tokens depend on all KV that a sequence reads, so each output token is also a
proof that no page was lost, shared or overwritten.
"""

import random

import pytest

from disagg.engine import ChunkDone, Refused
from disagg.engine.sequence import State
from support.engines import EOS, VOCAB, make_request, make_scheduler
from support.fake_runner import FakeRunner, expected_token


class Followed:
    """What the client of one request knows."""

    def __init__(self, request):
        self.request = request
        self.tokens = list(request.token_ids)
        self.ended = None
        self.pages = []

    @property
    def position(self):
        return len(self.tokens) - self.request.num_prompt_tokens


class Simulation:
    """One scheduler with up to `depth` plans in flight; a plan is run as late as it may be."""

    def __init__(self, seed, depth):
        self.random = random.Random(seed)
        self.depth = depth
        choose = self.random.randint
        self.page_size = choose(1, 4)
        self.num_pages = choose(4, 20)
        self.max_model_len = choose(6, 40)
        max_num_seqs = choose(1, 5)
        self.budget = choose(max_num_seqs, 12)
        self.scheduler = make_scheduler(
            self.num_pages,
            self.page_size,
            prefix=self.random.choice(["radix", "radix", "slow", "none"]),
            max_num_seqs=max_num_seqs,
            max_num_batched_tokens=self.budget,
            max_model_len=self.max_model_len,
            max_queued_tokens=60,
        )
        self.runner = FakeRunner(self.num_pages, self.page_size, VOCAB)
        self.live = {}
        self.reserved = {}
        self.quarantined = []
        self.held = set()
        self.flights = []
        self.num_requests = 0
        self.num_steps = 0
        self.actions = [
            (self.add, 5),
            (self.reserve, 3),
            (self.land, 4),
            (self.abort, 1),
            (self.abort_and_keep, 1),
            (self.release, 3),
            (self.quarantine, 1),
            (self.fence, 2),
            (self.step, 25),
        ]

    def act(self):
        action = self.random.choices([a for a, _ in self.actions], [w for _, w in self.actions])[0]
        action()
        self.check()

    def check(self):
        cache = self.scheduler._cache
        assert cache.num_free + cache.num_cached + cache.num_in_use == self.num_pages
        self.scheduler.audit()

    def make_request(self, **changes):
        choose = self.random.randint
        # Few tokens and few prompts, so that prefixes are shared and duplicated all the time.
        if self.live and choose(0, 2) == 0:
            tokens = list(self.random.choice(list(self.live.values())).tokens)
        else:
            tokens = [choose(0, 1) for _ in range(choose(1, self.max_model_len))]
        self.num_requests += 1
        return make_request(
            f"r{self.num_requests}",
            tokens,
            max_tokens=choose(1, 12),
            ignore_eos=self.random.random() < 0.3,
            stop_token_ids=(3,) if self.random.random() < 0.2 else (),
            cache_salt=self.random.choice(["", "", "x"]),
            **changes,
        )

    def pick(self, among):
        return self.random.choice(sorted(among)) if among else None

    def add(self, request=None):
        request = request or self.make_request(prefill_only=self.random.random() < 0.3)
        added = self.scheduler.add(request)
        if not isinstance(added, Refused):
            self.live[request.request_id] = Followed(request)

    def reserve(self):
        request = self.make_request()
        cap_match = self.random.random() < 0.5
        reservation = self.scheduler.reserve(request, cap_match)
        if isinstance(reservation, Refused):
            return
        num_tokens = len(request.token_ids)
        assert len(reservation.page_ids) == -(-num_tokens // self.page_size)
        assert reservation.cached_tokens == reservation.first_missing_page * self.page_size
        assert reservation.cached_tokens < num_tokens or not cap_match
        self.runner.scribble(reservation.page_ids[reservation.first_missing_page :])
        self.live[request.request_id] = Followed(request)
        self.reserved[request.request_id] = reservation

    def land(self):
        request_id = self.pick(self.reserved)
        if request_id is None:
            return
        reservation, followed = self.reserved.pop(request_id), self.live[request_id]
        self.runner.write(reservation.page_ids, followed.tokens, reservation.first_missing_page)
        token = expected_token(followed.tokens, VOCAB)
        followed.tokens.append(token)
        finished = self.end_of(followed) is not None
        self.scheduler.start(request_id, token, finished)
        if finished:
            del self.live[request_id]

    def abort(self):
        # Reservations whose writes may still arrive are not aborted, they are quarantined.
        request_id = self.pick(self.live.keys() - self.reserved.keys())
        if request_id is None:
            return
        self.scheduler.abort(request_id)
        self.scheduler.abort(request_id)
        self.forget(request_id)

    def abort_and_keep(self):
        request_id = self.pick(self.live.keys() - self.reserved.keys())
        if request_id is not None:
            self.scheduler.abort(request_id, keep_pages=True)
            self.forget(request_id)
            self.held.add(request_id)

    def release(self):
        request_id = self.pick(self.held)
        if request_id is None:
            return
        if request_id in self.live:
            followed = self.live[request_id]
            kv = [value for page in followed.pages for value in self.runner.kv[page]]
            expected = FakeRunner(len(followed.pages), self.page_size, VOCAB)
            expected.write(range(len(followed.pages)), followed.request.token_ids)
            num_tokens = len(followed.request.token_ids)
            assert kv[:num_tokens] == [v for page in expected.kv for v in page][:num_tokens]
        self.scheduler.release(request_id)
        self.forget(request_id)

    def forget(self, request_id):
        self.live.pop(request_id, None)
        self.held.discard(request_id)

    def quarantine(self):
        request_id = self.pick(self.reserved)
        if request_id is None:
            return
        reservation = self.reserved.pop(request_id)
        pages = self.scheduler.quarantine(request_id)
        assert pages == reservation.page_ids[reservation.first_missing_page :]
        self.forget(request_id)
        self.quarantined.append(pages)

    def fence(self):
        for pages in self.quarantined:
            self.runner.scribble(pages)
        if self.quarantined:
            self.scheduler.unquarantine(self.quarantined.pop(self.random.randrange(len(self.quarantined))))

    def step(self):
        if len(self.flights) < self.depth:
            plan = self.scheduler.plan()
            if plan is not None:
                assert plan.num_tokens <= self.budget
                self.flights.append(plan)
        # With a depth of 1 every step is retired at once, else some stay in flight.
        while self.flights and (len(self.flights) == self.depth or self.random.random() < 0.3):
            plan = self.flights.pop(0)
            self.on_events(self.scheduler.retire(plan, self.runner.run(plan)))
            self.num_steps += 1
        self.on_events(self.scheduler.take_events())

    def on_events(self, events):
        for event in events:
            followed = self.live[event.request_id]
            if isinstance(event, ChunkDone):
                self.on_chunk(followed, event)
            else:
                self.on_output(followed, event)

    def on_output(self, followed, output):
        assert followed.ended is None, "a token after the end"
        assert output.position == followed.position
        for token in output.token_ids:
            assert token == expected_token(followed.tokens, VOCAB), "KV was lost or overwritten"
            followed.tokens.append(token)
        if output.finish_reason == "handed_back":
            del self.live[output.request_id]
            self.replay(followed)
            return
        assert output.finish_reason == self.end_of(followed)
        followed.ended = output.finish_reason
        if followed.request.prefill_only:
            self.held.add(output.request_id)
        elif followed.ended:
            del self.live[output.request_id]

    def replay(self, followed):
        request = followed.request
        self.num_requests += 1
        self.add(
            make_request(
                f"r{self.num_requests}",
                followed.tokens,
                request.num_prompt_tokens,
                cache_salt=request.cache_salt,
                max_tokens=request.sampling.max_tokens,
                ignore_eos=request.sampling.ignore_eos,
                stop_token_ids=request.sampling.stop_token_ids,
            )
        )

    def on_chunk(self, followed, chunk):
        num_tokens = len(followed.request.token_ids)
        assert chunk.page_ids[: len(followed.pages)] == followed.pages, "a page that was sent has changed"
        assert chunk.is_last == (chunk.num_computed == num_tokens)
        size = self.page_size
        expected = -(-num_tokens // size) if chunk.is_last else chunk.num_computed // size
        assert len(chunk.page_ids) == expected
        followed.pages = chunk.page_ids

    def end_of(self, followed):
        sampling = followed.request.sampling
        if followed.tokens[-1] in sampling.stop_token_ids:
            return "stop"
        if followed.tokens[-1] == EOS and not sampling.ignore_eos:
            return "stop"
        if followed.position >= sampling.max_tokens or len(followed.tokens) >= self.max_model_len:
            return "length"
        return None

    def finish(self):
        """Let everything end by itself; nothing may be left."""
        self.actions = [(self.land, 1), (self.release, 1), (self.fence, 1), (self.step, 3)]
        for _ in range(5000):
            if not self.live and not self.held and not self.quarantined and not self.flights:
                break
            self.act()
        assert not self.live, "requests that never end"
        assert self.scheduler.count(*(set(State) - {State.ENDED})) == 0
        assert self.scheduler._cache.num_in_use == 0
        assert self.scheduler._slots.num_free == self.scheduler.limits.max_num_seqs


@pytest.mark.parametrize("depth", [1, 2, 3])
def test_no_page_is_lost_or_shared_whatever_happens(depth: int) -> None:
    """Every request ends with the right tokens, and every page comes back."""
    steps = 0
    for seed in range(60):
        simulation = Simulation(seed * 10 + depth, depth)
        for _ in range(400):
            simulation.act()
        simulation.finish()
        steps += simulation.num_steps
    assert steps > 5_000
