"""The decoder that all families share: pre-norm, rotary attention, gated MLP.

One rank's share of it. Tokens of all sequences of a step lie flat in one axis; where each belongs
is the `AttentionBatch`'s business.
"""

import torch
from msgspec import Struct
from torch import Tensor

from disagg.attention import AttentionBackend, AttentionBatch
from disagg.layers import ops
from disagg.layers.fp8 import ScaledMatrix, Weight
from disagg.models.parameters import vocab_range
from disagg.models.spec import ModelSpec
from disagg.models.workspace import Activations, Widths, Workspace
from disagg.parallel import TensorParallel


class LayerWeights(Struct, frozen=True, kw_only=True):
    """One layer's parameters on this rank; matrices `[outputs, inputs]`, maybe packed (`ops`) or scaled."""

    input_norm: Tensor
    qkv: Weight
    """Rows of q, then k, then v."""
    output: Weight
    mlp_norm: Tensor
    gate_up: Weight
    """Of `ops.pack_gate_up`, as its bias; scaled, or of each expert, rows of gate, then up."""
    down: Weight
    router: Tensor | None = None
    """`[experts, hidden]`: scores of a token's experts, where there are any."""
    qkv_bias: Tensor | None = None
    output_bias: Tensor | None = None
    gate_up_bias: Tensor | None = None
    down_bias: Tensor | None = None
    q_norm: Tensor | None = None
    k_norm: Tensor | None = None


class Decoder:
    """One rank's weights and the way through them. Used by one thread."""

    def __init__(
        self,
        spec: ModelSpec,
        tp: TensorParallel,
        *,
        embedding: Tensor,
        layers: list[LayerWeights],
        final_norm: Tensor,
        lm_head: Tensor,
        cos_sin: Tensor,
    ) -> None:
        """Take ownership of the weights.

        `embedding` and `lm_head` hold the rows of `vocab_range` and may be the same tensor;
        `cos_sin` is float32 `[positions, head_dim]`, see `cos_sin_cache`.
        """
        self.spec = spec
        self.tp = tp
        self.num_heads = spec.num_heads // tp.size
        self.num_kv_heads = spec.num_kv_heads // tp.size
        self._vocab = vocab_range(spec, tp.rank, tp.size)
        self._embedding = embedding
        self._layers = layers
        self._final_norm = final_norm
        self._lm_head = lm_head
        self._cos_sin = cos_sin
        widths = Widths(
            spec.hidden_size,
            self.num_heads,
            self.num_kv_heads,
            spec.head_dim,
            0 if spec.experts else spec.intermediate_size // tp.size,  # experts make room for themselves
        )
        self._workspace = Workspace(widths, self.dtype, self.device)

    @property
    def dtype(self) -> torch.dtype:
        """Of weights and activations."""
        return self._embedding.dtype

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return self._embedding.device

    def reserve(self, num_tokens: int) -> None:
        """Make room for steps of up to `num_tokens`: their buffers keep their addresses from here on."""
        self._workspace.reserve(num_tokens)

    @torch.inference_mode()
    def forward(
        self,
        token_ids: Tensor,
        batch: AttentionBatch,
        attention: AttentionBackend,
        pool: Tensor,
        logits_at: Tensor | None,
    ) -> Tensor:
        """Run one step: store every new token's K and V in the pool, and compute some tokens' logits.

        Args:
            token_ids: New tokens of all sequences, `[tokens]`, each in `[0, vocab_size)`.
            batch: Where they belong. `attention` has planned it.
            attention: Reads the pool.
            pool: This rank's pages, `[page, kv_head, layer, 2, page_size, head_dim]`; written to.
            logits_at: Tokens whose logits are wanted, int64 `[n]`, indices into `token_ids`; None is all.

        Returns:
            Logits `[n, vocab_size]` on rank 0, in the model's dtype; `[n, 0]` on the other ranks.

        Raises:
            WorkerLost: another rank was lost. The pool's new entries are then undefined.
        """
        eps, last = self.spec.rms_eps, len(self._layers) - 1
        num_logits = len(token_ids if logits_at is None else logits_at)
        x = self._workspace.activations(len(token_ids))
        residual = self._embed(token_ids, x.residual)
        ops.rms_norm(residual, self._layers[0].input_norm, eps, out=x.normed)
        for i, layer in enumerate(self._layers):
            self._store_kv(i, layer, x, batch, pool)
            if i == last and num_logits == 0:
                break  # a chunk in mid-prompt: its K and V are all that is wanted of it
            attention.run(i, x.q, pool, x.attended)
            attended = x.attended
            pages = batch.token_pages
            if i == last and logits_at is not None:
                # The rest of the last layer acts on each token alone.
                attended, residual, pages = attended[logits_at], residual[logits_at], pages[logits_at]
                x = self._workspace.activations(num_logits)
            hidden = attended.flatten(1)
            self._add(hidden, layer.output, layer.output_bias, residual, layer.mlp_norm, x)
            next_norm = self._final_norm if i == last else self._layers[i + 1].input_norm
            if layer.router is None:
                ops.linear_silu_and_mul(x.normed, layer.gate_up, layer.gate_up_bias, x.gate_up, x.gated)
                self._add(x.gated, layer.down, layer.down_bias, residual, next_norm, x)
            else:
                self._add_experts(layer, residual, next_norm, x, pages)
        return self._logits(x.normed[:num_logits])

    def _embed(self, token_ids: Tensor, out: Tensor) -> Tensor:
        """Embeddings `[tokens, hidden]`; each rank adds those of its own part of the vocabulary."""
        if self.tp.size == 1:
            return ops.embedding(token_ids, self._embedding, out=out)
        local = token_ids - self._vocab.start
        elsewhere = (local < 0) | (local >= len(self._vocab))
        rows = ops.embedding(local.masked_fill(elsewhere, 0), self._embedding, out=out)
        return self.tp.all_reduce(rows.masked_fill_(elsewhere[:, None], 0.0))

    def _store_kv(
        self, index: int, layer: LayerWeights, x: Activations, batch: AttentionBatch, pool: Tensor
    ) -> None:
        """Project to q, k and v, rotate, and write k and v to their pages."""
        ops.linear(x.normed, layer.qkv, layer.qkv_bias, out=x.qkv)
        ops.rope_and_store(
            x.q,
            x.k,
            x.v,
            batch.positions,
            self._cos_sin,
            pool,
            index,
            batch.token_pages,
            batch.token_offsets,
            q_norm_weight=layer.q_norm,
            k_norm_weight=layer.k_norm,
            eps=self.spec.rms_eps,
        )

    def _add(
        self,
        hidden: Tensor,
        weight: Weight,
        bias: Tensor | None,
        residual: Tensor,
        norm: Tensor,
        x: Activations,
    ) -> None:
        """Project, add what all ranks have of it to the residual, and norm that into `x.normed`."""
        eps = self.spec.rms_eps
        if self.tp.size == 1:
            ops.linear_add_rms_norm(hidden, weight, bias, residual, norm, eps, x.delta, x.normed)
        else:
            ops.linear(hidden, weight, bias, out=x.delta)
            ops.add_rms_norm(self.tp.all_reduce(x.delta), residual, norm, eps, out=x.normed)

    def _add_experts(
        self, layer: LayerWeights, residual: Tensor, norm: Tensor, x: Activations, token_pages: Tensor
    ) -> None:
        """As `_add`, of what a mixture of experts makes of `x.normed`; they pass over padding."""
        assert self.spec.experts is not None
        assert layer.router is not None
        assert not isinstance(layer.gate_up, ScaledMatrix)
        assert not isinstance(layer.down, ScaledMatrix)
        scores = ops.linear(x.normed, layer.router)
        chosen = (self.spec.experts.choices, self.spec.experts.normalize)
        ops.experts(x.normed, scores, *chosen, token_pages, layer.gate_up, layer.down, out=x.delta)
        ops.add_rms_norm(self.tp.all_reduce(x.delta), residual, norm, self.spec.rms_eps, out=x.normed)

    def _logits(self, hidden: Tensor) -> Tensor:
        """Logits of the whole vocabulary on rank 0. Nothing is exchanged for no rows."""
        if len(hidden) == 0:
            return hidden.new_empty((0, self.spec.vocab_size if self.tp.rank == 0 else 0))
        local = ops.linear(hidden, self._lm_head)
        if self.tp.size == 1:
            return local
        width = -(-self.spec.vocab_size // self.tp.size)
        padded = torch.nn.functional.pad(local, (0, width - local.shape[-1]))
        whole = self.tp.gather_last_dim(padded)
        return hidden.new_empty((len(hidden), 0)) if whole is None else whole[:, : self.spec.vocab_size]
