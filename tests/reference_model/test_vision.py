"""The vision tower equals transformers' and a textbook one for images of any grid and for videos."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional
from transformers.models.qwen3_5_moe.configuration_qwen3_5_moe import Qwen3_5MoeVisionConfig

from reference_model.attention import AttentionKind
from reference_model.config import VisionConfig
from reference_model.config_fields import ConfigError
from reference_model.rope import rotate
from reference_model.vision import (
    Grid,
    VisionInputError,
    VisionTower,
    axial_rotation,
    interpolate,
    patch_places,
    start_vision,
)
from tests.reference_model import textbook_vision, upstream
from tests.tolerances import tolerances

LIMITS = tolerances("reference_model")

SIZES: dict[str, Any] = {
    "depth": 3,
    "hidden_size": 24,
    "intermediate_size": 40,
    "num_heads": 3,
    "out_hidden_size": 20,
    "num_position_embeddings": 25,
    "patch_size": 5,
    "spatial_merge_size": 2,
    "temporal_patch_size": 2,
    "in_channels": 3,
}
OTHERS: list[dict[str, Any]] = [
    {"spatial_merge_size": 3, "num_position_embeddings": 49},
    {"temporal_patch_size": 3, "in_channels": 1, "num_position_embeddings": 1},
    {"num_heads": 2, "spatial_merge_size": 1, "rope_parameters": {"rope_type": "axial", "rope_theta": 70.0}},
]
GRIDS: dict[str, list[Grid]] = {
    "one": [(1, 2, 2)],
    "wide": [(1, 6, 4)],
    "strip": [(1, 2, 14)],
    "video": [(3, 2, 8)],
    "two": [(1, 10, 6), (1, 2, 4)],
    "mixed": [(1, 4, 2), (2, 6, 12), (1, 2, 14), (1, 4, 2)],
}


def tower(
    dtype: torch.dtype = torch.float32, attention: AttentionKind = "sdpa", seed: int = 3, **changes: Any
) -> VisionTower:
    built = VisionTower(VisionConfig.from_dict(SIZES | changes), attention)
    start_vision(built, seed)
    return built.requires_grad_(False).to(dtype)


def pixels(grids: list[Grid], dtype: torch.dtype = torch.float32, **changes: Any) -> Tensor:
    sizes = SIZES | changes
    count = sum(math.prod(grid) for grid in grids)
    width = sizes["in_channels"] * sizes["temporal_patch_size"] * sizes["patch_size"] ** 2
    return torch.randn(count, width, generator=torch.Generator().manual_seed(0)).to(dtype)


def worst(ours: Tensor, theirs: Tensor) -> float:
    return float((ours - theirs).abs().max() / theirs.abs().max().clamp(min=1.0))


@pytest.mark.parametrize("grids", GRIDS.values(), ids=GRIDS.keys())
def test_the_tower_in_fp32_equals_that_of_transformers(grids: list[Grid]) -> None:
    ours = tower()
    theirs = upstream.build_tower(SIZES, ours.state_dict())
    got = ours(pixels(grids), grids)
    assert got.shape == (sum(math.prod(grid) for grid in grids) // 4, 20)
    assert worst(got, theirs(pixels(grids), torch.tensor(grids)).pooler_output) <= LIMITS["vision_fp32"]


@pytest.mark.parametrize("changes", [{}, *OTHERS], ids=str)
def test_the_tower_in_fp64_equals_that_of_transformers_without_its_casts(changes: dict[str, Any]) -> None:
    grids: list[Grid] = [(1, 12, 6), (3, 6, 18), (1, 6, 6)]
    ours = tower(torch.float64, **changes)
    theirs = upstream.build_tower(SIZES | changes, ours.state_dict(), torch.float64)
    patches = pixels(grids, torch.float64, **changes)
    # transformers rounds the weights of learned positions to fp32 unless they are given.
    entries, weights = textbook_vision.padded_corners(SIZES | changes, grids)
    with upstream.LiftedCasts():
        expected = theirs(patches, torch.tensor(grids), interp_indices=entries, interp_weights=weights).pooler_output
    assert expected.dtype == torch.float64
    assert worst(ours(patches, grids), expected) <= LIMITS["vision_fp64"]


def test_the_tower_in_bf16_is_no_further_from_transformers_than_its_rounding() -> None:
    grids = GRIDS["mixed"]
    stored = {name: weight.bfloat16() for name, weight in tower().state_dict().items()}
    wide, half = (
        upstream.build_tower(SIZES, stored, dtype)(pixels(grids).to(dtype), torch.tensor(grids)).pooler_output.float()
        for dtype in (torch.float32, torch.bfloat16)
    )
    got = tower(torch.bfloat16, "plain")(pixels(grids), grids)
    assert got.dtype == torch.bfloat16
    assert (got.float() - half).norm() <= (half - wide).norm()


@pytest.mark.parametrize("changes", [{}, *OTHERS], ids=str)
def test_the_tower_equals_the_textbook_on_raw_pixels(changes: dict[str, Any]) -> None:
    changes = {"depth": 2, **changes}
    sizes = SIZES | changes
    ours = tower(torch.float64, **changes)
    size, pictures = sizes["patch_size"], sizes["temporal_patch_size"]
    grids: list[Grid] = [(1, 6, 6), (2, 6, 3 if sizes["spatial_merge_size"] % 2 else 4)]
    gen = torch.Generator().manual_seed(1)
    videos, patches = [], []
    for grid in grids:
        shape = (grid[0] * pictures, sizes["in_channels"], grid[1] * size, grid[2] * size)
        videos.append(torch.randn(shape, generator=gen, dtype=torch.float64))
        places = textbook_vision.places(sizes, grid)
        patches += [textbook_vision.patch(sizes, videos[-1], place).flatten() for place in places]
    got = ours(torch.stack(patches), grids)
    expected = textbook_vision.tower(sizes, ours.state_dict(), list(zip(videos, grids, strict=True)))
    assert worst(got, expected) <= LIMITS["vision_fp64"]


@given(side=st.integers(1, 9), rows=st.integers(1, 12), columns=st.integers(1, 12), merge=st.integers(1, 3))
@settings(deadline=None, max_examples=60)
def test_positions_are_stretched_corner_on_corner(side: int, rows: int, columns: int, merge: int) -> None:
    """Against exact fractions, and against torch's bilinear resampling of the table as a picture."""
    rows, columns = rows * merge, columns * merge
    table = torch.randn(side * side, 3, generator=torch.Generator().manual_seed(side), dtype=torch.float64)
    places = patch_places(rows, columns, merge)
    got = interpolate(table, places, rows, columns)
    exact = [
        textbook_vision.learned(table, place, (1, rows, columns))
        for place in textbook_vision.places({"spatial_merge_size": merge}, (1, rows, columns))
    ]
    assert worst(got, torch.stack(exact)) <= LIMITS["vision_fp64"]
    picture = table.T.view(1, 3, side, side)
    resized = functional.interpolate(picture, (rows, columns), mode="bilinear", align_corners=True)[0]
    assert worst(got, resized[:, places[:, 0], places[:, 1]].T) <= LIMITS["vision_fp64"]


@given(rows=st.integers(1, 12), columns=st.integers(1, 12), merge=st.integers(1, 4))
@settings(deadline=None)
def test_every_patch_has_one_place_and_neighbours_stand_together(rows: int, columns: int, merge: int) -> None:
    places = patch_places(rows * merge, columns * merge, merge)
    assert len(set(map(tuple, places.tolist()))) == len(places) == rows * columns * merge * merge
    blocks = (places // merge).view(-1, merge * merge, 2)
    assert bool((blocks == blocks[:, :1]).all())
    assert (blocks[:, 0, 0] * columns + blocks[:, 0, 1]).tolist() == list(range(rows * columns))


@given(
    row=st.integers(0, 200),
    column=st.integers(0, 200),
    quarter=st.integers(1, 5),
    theta=st.sampled_from([3.0, 100.0, 10_000.0]),
)
@settings(deadline=None)
def test_heads_are_turned_by_row_and_column(row: int, column: int, quarter: int, theta: float) -> None:
    sizes = SIZES | {"hidden_size": 12 * quarter, "rope_parameters": {"rope_type": "axial", "rope_theta": theta}}
    config = VisionConfig.from_dict(sizes)
    x = torch.randn(1, 1, 3, 4 * quarter, generator=torch.Generator().manual_seed(row), dtype=torch.float64)
    got = rotate(x, axial_rotation(config, torch.tensor([[row, column]])))[0, 0]
    place = (0, row, column)
    assert (
        worst(got, torch.stack([textbook_vision.rotated(sizes, head, place) for head in x[0, 0]]))
        <= LIMITS["vision_fp64"]
    )
    exact = torch.stack([textbook_vision.rotated_exactly(theta, head, place) for head in x[0, 0]])
    assert worst(got, exact) <= LIMITS["axial_angles"] * max(row, column, 1)


@given(st.lists(st.tuples(st.integers(1, 2), st.integers(1, 3), st.integers(1, 3)), min_size=2, max_size=3))
@settings(deadline=None, max_examples=10)
def test_pictures_and_frames_do_not_see_each_other(halves: list[Grid]) -> None:
    grids: list[Grid] = [(frames, 2 * rows, 2 * columns) for frames, rows, columns in halves]
    ours, patches = tower(torch.float64, depth=2), pixels(grids, torch.float64)
    got = ours(patches, grids)
    begin = 0
    for frames, rows, columns in grids:
        for _ in range(frames):
            end = begin + rows * columns
            alone = ours(patches[begin:end], [(1, rows, columns)])
            assert worst(got[begin // 4 : end // 4], alone) <= LIMITS["vision_fp64"]
            begin = end


def test_both_ways_of_attending_agree() -> None:
    grids = GRIDS["mixed"]
    plain, fast = (tower(torch.float64, kind)(pixels(grids), grids) for kind in ("plain", "sdpa"))
    assert worst(plain, fast) <= LIMITS["vision_fp64"]


@pytest.mark.parametrize("grid", [(1, 3, 4), (1, 4, 5), (0, 4, 4), (1, 0, 4)])
def test_a_grid_that_the_merger_does_not_divide_is_refused(grid: Grid) -> None:
    with pytest.raises(VisionInputError, match=rf"grid 1 is {list(grid)}".replace("[", r"\[")):
        tower()(pixels([(1, 4, 4), grid]), [(1, 4, 4), grid])


def test_pixels_must_fill_the_grids() -> None:
    grids: list[Grid] = [(1, 4, 4), (2, 2, 2)]
    for wrong in (pixels(grids)[1:], pixels(grids)[:, 1:], pixels(grids).unsqueeze(0)):
        with pytest.raises(
            VisionInputError, match=r"2 grids \[\[1, 4, 4\], \[2, 2, 2\]\] need floating-point \[24, 150\]"
        ):
            tower()(wrong, grids)
    with pytest.raises(VisionInputError, match="there are no grids"):
        tower()(pixels([]), [])


@pytest.mark.parametrize(("change", "words"), [
    ({"num_position_embeddings": 24}, "24 is no square"),
    ({"hidden_act": "silu"}, "silu"),
    ({"rope_parameters": {"rope_type": "default"}}, "default"),
    ({"num_heads": 5}, "5 heads"),
    ({"deepstack_visual_indexes": [1]}, "deepstack"),
])  # fmt: skip
def test_what_the_tower_cannot_be_is_refused(change: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        VisionConfig.from_dict(SIZES | change)


def test_our_config_reads_what_transformers_writes() -> None:
    written = Qwen3_5MoeVisionConfig(**SIZES).to_dict()
    assert VisionConfig.from_dict(written) == VisionConfig.from_dict(SIZES)


def test_the_same_seed_gives_the_same_weights_and_no_two_biases_are_equal() -> None:
    first, again, other = (tower(seed=seed).state_dict() for seed in (0, 0, 1))
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not any(torch.equal(first[name], other[name]) for name in first)
