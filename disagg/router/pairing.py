"""Which workers this router can use at all, and which of them can exchange KV. Pure functions over Welcomes.

So two versions of a model can live in one release while a pool rolls: a request is computed within one
version, and what one model began another never continues.
"""

from disagg.protocol import PROTOCOL_VERSION, Welcome

KvTerms = tuple[tuple[str, str | int], ...]
"""What two workers of a pair must agree on, by name; equal or they are no pair."""


def why_refused(welcome: Welcome, tokenizer_hash: str | None) -> str | None:
    """Say why this router can give a worker no work; None where it can.

    An unknown tokenizer, of either side, refuses nobody.
    """
    if welcome.protocol_version != PROTOCOL_VERSION:
        return f"it speaks protocol version {welcome.protocol_version}, this router {PROTOCOL_VERSION}"
    if tokenizer_hash and welcome.tokenizer_hash and welcome.tokenizer_hash != tokenizer_hash:
        return f"its tokenizer is {welcome.tokenizer_hash}, this router's {tokenizer_hash}"
    return None


def kv_terms(welcome: Welcome) -> KvTerms:
    """Name what a worker's KV is like. Tensor-parallel sizes may differ within a pair."""
    layout = welcome.layout
    return (
        ("model", welcome.model_hash),
        ("dtype", welcome.dtype),
        ("page size", layout.page_size),
        ("number of KV heads", layout.num_kv_heads),
        ("number of layers", layout.num_layers),
        ("head size", layout.head_dim),
        ("KV dtype", layout.dtype),
        ("transport", welcome.transport),
    )


def why_incompatible(one: KvTerms, other: KvTerms) -> str | None:
    """Say in what two workers differ first; None where they can exchange KV."""
    for (name, here), (_, there) in zip(one, other, strict=True):
        if here != there:
            return f"its {name} is {there or 'unknown'}, here {here or 'unknown'}"
    return None


def page_salt(model_hash: str, cache_salt: str) -> str:
    """Salt the page hashes of one model: equal token ids have other KV in another one."""
    return f"{model_hash}/{cache_salt}" if model_hash else cache_salt
