"""Builders of engines that need no model."""

from disagg.engine import EngineRequest, Limits, Scheduler
from disagg.engine.engine import Engine
from disagg.kv import KvCache
from disagg.protocol import SamplingParams
from support.clock import FakeClock
from support.fake_runner import FakeRunner
from support.slow_core import SlowPagePool, SlowRadixTree

EOS = 7
VOCAB = 11


def make_cache(num_pages=16, page_size=4, prefix="radix"):
    """`prefix` is `radix`, `none`, or `slow` for the Python twins of the C++ core."""
    if prefix == "slow":
        return KvCache(SlowPagePool(num_pages), SlowRadixTree(page_size), page_size)
    return KvCache.make(num_pages, page_size, prefix)


def make_limits(num_pages=16, page_size=4, **changes):
    fields = {"max_num_seqs": 4, "max_num_batched_tokens": 16, "max_model_len": 64, "vocab_size": VOCAB}
    return Limits(**{**fields, "num_pages": num_pages, "page_size": page_size, **changes})


def make_scheduler(num_pages=16, page_size=4, prefix="radix", eos=(EOS,), clock=None, **limits):
    return Scheduler(
        cache=make_cache(num_pages, page_size, prefix),
        limits=make_limits(num_pages, page_size, **limits),
        eos_token_ids=frozenset(eos),
        clock=clock or FakeClock(),
    )


def make_engine(num_pages=16, page_size=4, prefix="radix", eos=(EOS,), clock=None, runner=None, **limits):
    return Engine(
        runner=runner or FakeRunner(num_pages, page_size, VOCAB),
        cache=make_cache(num_pages, page_size, prefix),
        limits=make_limits(num_pages, page_size, **limits),
        eos_token_ids=eos,
        clock=clock or FakeClock(),
    )


def make_request(request_id="a", token_ids=(1, 2, 3), num_prompt_tokens=None, **changes):
    fields = {"cache_salt", "prefill_only"}
    return EngineRequest(
        request_id=request_id,
        token_ids=list(token_ids),
        num_prompt_tokens=num_prompt_tokens if num_prompt_tokens is not None else len(token_ids),
        sampling=SamplingParams(**{k: v for k, v in changes.items() if k not in fields}),
        **{k: v for k, v in changes.items() if k in fields},
    )


def run_all(engine, max_steps=1000):
    """Step until nothing is left to do; returns outputs by request and all events."""
    outputs, events = {}, []
    for _ in range(max_steps):
        step = engine.step()
        if step is None:
            return outputs, events
        for event in step.events:
            events.append(event)
            if hasattr(event, "token_ids"):
                outputs.setdefault(event.request_id, []).extend(event.token_ids)
    raise AssertionError(f"still running after {max_steps} steps")
