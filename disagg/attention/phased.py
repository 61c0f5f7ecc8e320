"""Two backends in one: each phase of a mixed batch by the kernel that suits it."""

from torch import Tensor

from disagg.attention.base import AttentionBackend
from disagg.attention.batch import AttentionBatch


class PhasedAttention:
    """Prefill chunks by one backend, decodes by another."""

    def __init__(self, prefill: AttentionBackend, decode: AttentionBackend) -> None:
        self._prefill = prefill
        self._decode = decode
        self._num_decodes = self._num_prefills = 0

    @property
    def name(self) -> str:
        """Both names, as `--attention-backend` spells them."""
        return f"{self._prefill.name},{self._decode.name}"

    @property
    def capturable(self) -> bool:
        """As the decode backend says: prefill is not captured."""
        return self._decode.capturable

    def plan(self, batch: AttentionBatch) -> None:
        """Prepare each backend for its part of `batch`."""
        self._num_decodes = batch.num_decodes
        self._num_prefills = batch.num_sequences - batch.num_decodes
        if self._num_prefills == 0:
            self._decode.plan(batch)  # as it is: it may be static
            return
        if self._num_decodes:
            self._decode.plan(batch.sequences(0, batch.num_decodes))
        self._prefill.plan(batch.sequences(batch.num_decodes, batch.num_sequences))

    def run(self, layer: int, q: Tensor, pool: Tensor, out: Tensor) -> None:
        """Attend with the planned batch's tokens; a decode has one, so they are the first rows."""
        at = self._num_decodes
        if self._num_decodes:
            self._decode.run(layer, q[:at], pool, out[:at])
        if self._num_prefills:
            self._prefill.run(layer, q[at:], pool, out[at:])
