"""Page hashes of one prompt, as each kind of worker makes them."""

import numpy as np
from numpy.typing import NDArray

from disagg._core import page_hashes
from disagg.router.pairing import page_salt


class PromptHashes:
    """Made when first asked for, and once for each page size and model."""

    def __init__(self, token_ids: list[int], cache_salt: str) -> None:
        self._token_ids = token_ids
        self._cache_salt = cache_salt
        self._made: dict[tuple[int, str], NDArray[np.uint64]] = {}

    def of(self, page_size: int, model_hash: str) -> NDArray[np.uint64]:
        """Hash the whole pages."""
        made = self._made.get((page_size, model_hash))
        if made is None:
            tokens = np.array(self._token_ids, np.int32)
            made = page_hashes(tokens, page_size, page_salt(model_hash, self._cache_salt))
            self._made[page_size, model_hash] = made
        return made
