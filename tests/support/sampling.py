"""Builders for the sampler."""

import numpy as np

from disagg.engine.draws import SamplingRows, draw_keys


def make_rows(n, temperature=1.0, top_k=0, top_p=1.0, min_p=0.0, key=0, position=0):
    """`n` rows; a scalar stands for all of them. `key` is the seed."""

    def column(value, dtype):
        values = np.array(list(value) if isinstance(value, (list, range)) else [value] * n)
        return values.astype(dtype)

    keys = draw_keys(column(key, np.uint64), np.zeros(n, np.int32), column(position, np.int32))
    return SamplingRows(
        column(temperature, np.float32),
        column(top_k, np.int32),
        column(top_p, np.float32),
        column(min_p, np.float32),
        keys,
    )
