"""The table of angles, against transformers' for each way of scaling it."""

import pytest
import torch
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from disagg.layers.rope import RopeSpec, cos_sin_cache

LLAMA3 = {
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}


@pytest.mark.parametrize(
    ("rope", "parameters"),
    [
        (RopeSpec(theta=1e5), {"rope_type": "default"}),
        (RopeSpec(theta=1e4, kind="linear", factor=4.0), {"rope_type": "linear", "factor": 4.0}),
        (RopeSpec(theta=5e5, kind="llama3", factor=8.0), {"rope_type": "llama3", **LLAMA3}),
    ],
)
def test_angles_are_those_of_transformers(rope: RopeSpec, parameters: dict[str, float | str]) -> None:
    config = LlamaConfig(
        hidden_size=256,
        num_attention_heads=4,
        max_position_embeddings=16384,
        rope_parameters={"rope_theta": rope.theta, **parameters},
    )
    positions = torch.tensor([[0, 1, 17, 4095, 8192, 16383]])
    cos, sin = LlamaRotaryEmbedding(config)(torch.zeros(1), positions)
    table = cos_sin_cache(rope, 64, 16384, torch.device("cpu"))[positions[0]]
    assert table.dtype == torch.float32
    # The reference repeats each half's angles; far positions magnify the last bit of a frequency.
    torch.testing.assert_close(table, torch.cat([cos[0, :, :32], sin[0, :, :32]], -1), atol=2e-3, rtol=0)
    torch.testing.assert_close(
        table[:3], torch.cat([cos[0, :3, :32], sin[0, :3, :32]], -1), atol=1e-6, rtol=0
    )
