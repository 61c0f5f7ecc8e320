"""KV pages: layout arithmetic, the page pool, prefix caches behind one interface.

May import `protocol`, `errors` and the C++ core; `views.py` alone imports torch and is imported by
name. Read `layout.py` first, then `cache.py`, the one owner of a worker's page ids.
"""

from disagg.kv.cache import Commit, KvCache, PrefixMatch
from disagg.kv.layout import PageLayout
from disagg.kv.prefix import (
    PREFIX_CACHES,
    NoPrefixCache,
    PageIds,
    PagePool,
    PrefixCache,
    Tokens,
    make_prefix_cache,
)

__all__ = [
    "PREFIX_CACHES",
    "Commit",
    "KvCache",
    "NoPrefixCache",
    "PageIds",
    "PageLayout",
    "PagePool",
    "PrefixCache",
    "PrefixMatch",
    "Tokens",
    "make_prefix_cache",
]
