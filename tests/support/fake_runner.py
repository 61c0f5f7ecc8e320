"""A runner without a model: KV is plain ints, and every token depends on all KV before it.

The KV of a position is a hash of its token and of the KV of all positions before it, read back
through the page table; a sampled token is a hash of all KV of the sequence. So a page that was
shared, reused or overwritten wrongly changes the output, which `expected_token` tells from the
tokens alone.
"""

import numpy as np

from disagg.engine.plan import PENDING, int32s

_MASK = 2**61 - 1


def _mix(token, total):
    return (token * 0x9E3779B97F4A7C15 + total * 6364136223846793005 + 1442695040888963407) & _MASK


def kv_of(token_ids):
    """KV of every position."""
    values, total = [], 0
    for token in token_ids:
        values.append(_mix(token, total))
        total += values[-1]
    return values


def expected_token(token_ids, vocab_size):
    """The token that follows `token_ids`."""
    return _sample(sum(kv_of(token_ids)), vocab_size)


def _sample(total, vocab_size):
    return (total >> 13) % vocab_size


class FakeRunner:
    def __init__(self, num_pages, page_size, vocab_size, depth=0):
        self.depth = depth
        self.kv = [[None] * page_size for _ in range(num_pages)]
        self.page_size = page_size
        self.vocab_size = vocab_size
        self.last_token = {}
        self.plans = []

    def write(self, page_ids, token_ids, first_page=0):
        """Let the KV of `token_ids` land in pages `[first_page, ...)` of a sequence."""
        for position, value in enumerate(kv_of(token_ids)):
            page, offset = divmod(position, self.page_size)
            if page >= first_page:
                self.kv[page_ids[page]][offset] = value

    def scribble(self, page_ids):
        """A remote writer overwrites pages with something else."""
        for page in page_ids:
            self.kv[page] = [-1 - page] * self.page_size

    def launch(self, plan):
        """As a device would: the tokens are told only when they are asked for."""
        tokens = self.run(plan)
        return lambda: tokens

    def wait(self, step):
        """Each has ended when it was launched."""

    def run(self, plan):
        self.plans.append(plan)
        tokens = int32s(plan.token_ids).tolist()
        indptr = int32s(plan.page_indptr).tolist()
        pages = int32s(plan.page_indices).tolist()
        lens = int32s(plan.query_lens).tolist()
        kv_lens = int32s(plan.kv_lens).tolist()
        slots = int32s(plan.slots).tolist()
        assert all(n == 1 for n in lens[: plan.num_decodes])
        assert sum(lens) == len(tokens) == plan.num_tokens
        totals, written, at = [], [], 0
        for row, slot in enumerate(slots):
            row_pages = pages[indptr[row] : indptr[row + 1]]
            assert len(row_pages) == -(-kv_lens[row] // self.page_size)
            start = kv_lens[row] - lens[row]
            held = [value for page in row_pages for value in self.kv[page]]
            total = sum(held[:start])
            for position in range(start, kv_lens[row]):
                token = tokens[at]
                token = self.last_token[slot] if token == PENDING else token
                page, offset = divmod(position, self.page_size)
                value = _mix(token, total)
                self.kv[row_pages[page]][offset] = value
                total += value
                at += 1
            written.append(set(row_pages[start // self.page_size :]))
            totals.append(total)
        assert sum(map(len, written)) == len(set().union(*written)), "two sequences write one page"
        sampled = []
        for row in int32s(plan.samples.rows).tolist():
            sampled.append(_sample(totals[row], self.vocab_size))
            self.last_token[slots[row]] = sampled[-1]
        positions = np.frombuffer(plan.samples.position, np.int32)
        assert len(positions) == len(sampled)
        assert (positions >= 0).all()
        return sampled
