"""Which rows and columns of which checkpoint tensors make up one rank's parameters.

Arithmetic only. Projections that read the same input are packed into one matrix (q, k, v; gate,
up). A rank has whole heads and a run of the MLP's inner columns, so matrices that write to heads or
to the MLP are cut by rows, and those that read from them by columns.
"""

from collections.abc import Iterator

from msgspec import Struct

from disagg.errors import ConfigError
from disagg.models.spec import ModelSpec


class Piece(Struct, frozen=True):
    """A rectangle of one checkpoint tensor. Vectors have `rows` only."""

    name: str
    rows: range
    columns: range | None = None


class Parameter(Struct, frozen=True):
    """One tensor of a rank: its pieces, one below the other."""

    key: str
    shape: tuple[int, ...]
    """Of experts' matrices `[expert, rows, columns]`; their pieces fill it as if it were one matrix."""
    pieces: tuple[Piece, ...]
    in_layer: bool = False
    """Whether it is a matrix of a layer: what `quantization` is about."""


def check_tensor_parallel(spec: ModelSpec, size: int) -> None:
    """Refuse a tensor-parallel size that does not give every rank whole heads and equal columns.

    Raises:
        ConfigError: names what does not divide and the sizes that work.
    """
    working = tensor_parallel_sizes(spec)
    if size in working:
        return
    if spec.num_kv_heads % size:
        reason = f"the model's {spec.num_kv_heads} KV heads"
    else:
        reason = f"the model's intermediate_size {spec.intermediate_size}"
    *most, last = [str(n) for n in working]
    choices = f"{', '.join(most)} or {last}" if most else last
    raise ConfigError(f"tensor_parallel_size {size} does not divide {reason}; use {choices}")


def tensor_parallel_sizes(spec: ModelSpec) -> list[int]:
    """The sizes that work, ascending. Query heads are a multiple of KV heads, so they divide as well."""
    return [
        size
        for size in range(1, spec.num_kv_heads + 1)
        if spec.num_kv_heads % size == 0 and spec.intermediate_size % size == 0
    ]


def vocab_range(spec: ModelSpec, rank: int, size: int) -> range:
    """The token ids whose embedding and logits a rank holds; the last rank's may be fewer."""
    width = -(-spec.vocab_size // size)
    return range(min(rank * width, spec.vocab_size), min((rank + 1) * width, spec.vocab_size))


def plan_parameters(spec: ModelSpec, rank: int, size: int) -> list[Parameter]:
    """Everything that `rank` of `size` holds, in the order of the layers."""
    vocab = vocab_range(spec, rank, size)
    parameters = [_matrix("embedding", Piece("model.embed_tokens.weight", vocab), spec.hidden_size)]
    for layer in range(spec.num_layers):
        parameters += _plan_layer(spec, layer, rank, size)
    parameters.append(_vector("final_norm", Piece("model.norm.weight", range(spec.hidden_size))))
    if not spec.tie_word_embeddings:
        parameters.append(_matrix("lm_head", Piece("lm_head.weight", vocab), spec.hidden_size))
    return parameters


def _plan_layer(spec: ModelSpec, layer: int, rank: int, size: int) -> Iterator[Parameter]:
    """The fields of `LayerWeights` of one layer."""
    hidden = range(spec.hidden_size)
    q = _share(spec.num_heads * spec.head_dim, rank, size)
    kv = _share(spec.num_kv_heads * spec.head_dim, rank, size)
    inner = _share(spec.intermediate_size, rank, size)
    source, key = f"model.layers.{layer}.", f"layers.{layer}."
    qkv = [(f"{source}self_attn.{name}_proj", rows) for name, rows in (("q", q), ("k", kv), ("v", kv))]
    mlps = (
        [f"{source}mlp.experts.{i}" for i in range(spec.experts.count)] if spec.experts else [f"{source}mlp"]
    )
    gate_up = [(f"{mlp}.{name}_proj", inner) for mlp in mlps for name in ("gate", "up")]
    output, downs = f"{source}self_attn.o_proj", [f"{mlp}.down_proj" for mlp in mlps]

    yield _vector(f"{key}input_norm", Piece(f"{source}input_layernorm.weight", hidden))
    yield _packed(f"{key}qkv", qkv, spec.hidden_size)
    yield Parameter(
        f"{key}output", (len(hidden), len(q)), (Piece(f"{output}.weight", hidden, q),), in_layer=True
    )
    yield _vector(f"{key}mlp_norm", Piece(f"{source}post_attention_layernorm.weight", hidden))
    stacked = (len(mlps),) if spec.experts else ()
    if spec.experts:
        router = Piece(f"{source}mlp.gate.weight", range(spec.experts.count))
        yield _matrix(f"{key}router", router, spec.hidden_size)
    pieces = tuple(Piece(f"{name}.weight", rows) for name, rows in gate_up)
    yield Parameter(f"{key}gate_up", (*stacked, 2 * len(inner), len(hidden)), pieces, in_layer=True)
    pieces = tuple(Piece(f"{name}.weight", hidden, inner) for name in downs)
    yield Parameter(f"{key}down", (*stacked, len(hidden), len(inner)), pieces, in_layer=True)
    if spec.qkv_bias:
        yield _packed_bias(f"{key}qkv_bias", qkv)
    # Ranks' partial products are summed, so a bias after them belongs to one rank.
    if spec.output_bias and rank == 0:
        yield _vector(f"{key}output_bias", Piece(f"{output}.bias", hidden))
    if spec.mlp_bias:
        yield _packed_bias(f"{key}gate_up_bias", gate_up)
    if spec.mlp_bias and rank == 0:
        yield _vector(f"{key}down_bias", Piece(f"{downs[0]}.bias", hidden))
    if spec.qk_norm:
        head = range(spec.head_dim)
        yield _vector(f"{key}q_norm", Piece(f"{source}self_attn.q_norm.weight", head))
        yield _vector(f"{key}k_norm", Piece(f"{source}self_attn.k_norm.weight", head))


def _share(count: int, rank: int, size: int) -> range:
    width = count // size
    return range(rank * width, (rank + 1) * width)


def _matrix(key: str, piece: Piece, num_columns: int) -> Parameter:
    return Parameter(key, (len(piece.rows), num_columns), (piece,))


def _vector(key: str, piece: Piece) -> Parameter:
    return Parameter(key, (len(piece.rows),), (piece,))


def _packed(key: str, parts: list[tuple[str, range]], num_columns: int) -> Parameter:
    pieces = tuple(Piece(f"{name}.weight", rows) for name, rows in parts)
    return Parameter(key, (sum(len(rows) for _, rows in parts), num_columns), pieces, in_layer=True)


def _packed_bias(key: str, parts: list[tuple[str, range]]) -> Parameter:
    pieces = tuple(Piece(f"{name}.bias", rows) for name, rows in parts)
    return Parameter(key, (sum(len(rows) for _, rows in parts),), pieces)
