"""The vision tower equals transformers' for images of any grid and for videos."""

from __future__ import annotations

import pytest
import torch
from transformers.models.qwen3_5_moe.configuration_qwen3_5_moe import Qwen3_5MoeVisionConfig
from transformers.models.qwen3_5_moe.modeling_qwen3_5_moe import Qwen3_5MoeVisionModel

from reference_model.config import VisionConfig
from reference_model.vision import Grid, VisionTower, start_vision
from tests.tolerances import tolerances

SIZES = {
    "depth": 3,
    "hidden_size": 24,
    "intermediate_size": 40,
    "num_heads": 3,
    "out_hidden_size": 20,
    "num_position_embeddings": 25,
    "patch_size": 4,
    "spatial_merge_size": 2,
    "temporal_patch_size": 2,
    "in_channels": 3,
}


@pytest.mark.parametrize(
    "grids",
    [[(1, 2, 2)], [(1, 6, 4)], [(3, 2, 8)], [(1, 4, 2), (2, 6, 12), (1, 2, 14)]],
    ids=["one", "wide", "video", "three"],
)
@torch.no_grad()
def test_the_tower_equals_transformers(grids: list[Grid]) -> None:
    ours = VisionTower(VisionConfig.from_dict(SIZES))
    start_vision(ours, 3)
    theirs = Qwen3_5MoeVisionModel(Qwen3_5MoeVisionConfig(**SIZES)).eval()
    theirs.load_state_dict(ours.state_dict())
    patches = sum(frames * rows * columns for frames, rows, columns in grids)
    pixels = torch.randn(patches, 96, generator=torch.Generator().manual_seed(0))
    expected = theirs(pixels, torch.tensor(grids)).pooler_output
    actual = ours(pixels, grids)
    assert actual.shape == (patches // 4, 20)
    assert (actual - expected).abs().max() <= tolerances("reference_model")["vision_fp32"] * expected.abs().max().clamp(
        min=1
    )


def test_the_same_seed_gives_the_same_weights_and_no_two_biases_are_equal() -> None:
    towers = [VisionTower(VisionConfig.from_dict(SIZES)) for _ in range(3)]
    for tower, seed in zip(towers, (0, 0, 1), strict=True):
        start_vision(tower, seed)
    first, again, other = (tower.state_dict() for tower in towers)
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not any(torch.equal(first[name], other[name]) for name in first)
