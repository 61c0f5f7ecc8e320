"""Which requests can run here at all, and how many pages they take to begin. Decisions only."""

from msgspec import Struct

from disagg.engine.request import EngineRequest, Refused
from disagg.errors import ConfigError, InvalidRequest

MAX_INT32 = 2**31 - 1


class Limits(Struct, frozen=True, kw_only=True):
    """What one engine accepts. Build with `checked_limits`."""

    max_num_seqs: int
    """Slots: most sequences in one step."""
    max_num_batched_tokens: int
    """Most new tokens in one step."""
    max_model_len: int
    """Longest prompt plus output."""
    vocab_size: int
    num_pages: int
    page_size: int
    max_queued_tokens: int = 262_144
    """Prompt tokens that may wait; a request is accepted by an empty queue whatever its length."""

    def pages_of(self, num_tokens: int) -> int:
        """Pages that hold `num_tokens`."""
        return -(-num_tokens // self.page_size)


def checked_limits(limits: Limits) -> Limits:
    """Return `limits`, or raise ConfigError where no step could serve every running sequence."""
    if limits.max_num_batched_tokens < limits.max_num_seqs:
        raise ConfigError(
            f"--max-num-batched-tokens {limits.max_num_batched_tokens} is less than --max-num-seqs "
            f"{limits.max_num_seqs}: every running sequence must fit one step"
        )
    return limits


def limit_tokens(request: EngineRequest, limits: Limits) -> int:
    """Length at which the sequence ends: the original prompt and its `max_tokens`, or the context."""
    return min(request.num_prompt_tokens + request.sampling.max_tokens, limits.max_model_len)


def pages_to_begin(request: EngineRequest, limits: Limits) -> int:
    """Pages taken before a sequence runs: its tokens, and room for the next page of output.

    The promise: once begun, a sequence can add `page_size` tokens (or all that it may) before it
    needs another page. The newest token's KV is never stored, hence one less than the limit.
    """
    num_tokens = len(request.token_ids)
    if request.prefill_only:
        return limits.pages_of(num_tokens)
    return limits.pages_of(min(num_tokens + limits.page_size, limit_tokens(request, limits) - 1))


def refuse(request: EngineRequest, limits: Limits) -> Refused | None:
    """Say why a request can never run here, or None where it can."""
    num_tokens = len(request.token_ids)
    try:
        request.sampling.check()
    except InvalidRequest as error:
        return Refused("invalid", error.message)
    if not 0 <= request.sampling.choice_index <= MAX_INT32:
        return Refused("invalid", f"choice_index must fit 31 bits, got {request.sampling.choice_index}")
    if not 1 <= request.num_prompt_tokens <= num_tokens:
        return Refused("invalid", f"a prompt of {request.num_prompt_tokens} in {num_tokens} tokens")
    if min(request.token_ids) < 0 or max(request.token_ids) >= limits.vocab_size:
        return Refused("invalid", f"token ids must be at least 0 and below {limits.vocab_size}")
    if num_tokens >= limits.max_model_len:
        return Refused(
            "too_long", f"{num_tokens} tokens leave no room in a context of {limits.max_model_len}"
        )
    if num_tokens >= limit_tokens(request, limits):
        return Refused("invalid", f"max_tokens {request.sampling.max_tokens} are all in the replay already")
    return _refuse_pages(request, limits)


def _refuse_pages(request: EngineRequest, limits: Limits) -> Refused | None:
    stored = len(request.token_ids) if request.prefill_only else limit_tokens(request, limits) - 1
    if limits.pages_of(stored) > limits.num_pages:
        return Refused("too_long", f"{stored} tokens of KV never fit {limits.num_pages} pages")
    return None


def chunk_end(start: int, num_tokens: int, budget: int, page_size: int) -> int:
    """Where the next chunk ends: as far as the budget reaches, on a page's edge unless at the end.

    Full pages can be sent on and shared at once; a budget that reaches no edge is used as it is.
    """
    end = min(num_tokens, start + budget)
    if end == num_tokens:
        return end
    edge = end - end % page_size
    return edge if edge > start else end
