"""Positions of prompts with images and videos equal transformers' and those counted piece by piece."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from transformers import Qwen3_5MoeConfig
from transformers.models.qwen3_5_moe.modeling_qwen3_5_moe import Qwen3_5MoeModel

from reference_model.config import ModelConfig
from reference_model.positions import prompt_positions, token_kinds
from reference_model.vision import Grid, VisionInputError
from tests.reference_model import tiny, tiny_multimodal
from tests.reference_model.tiny_multimodal import CONFIG, Piece, Prompts, flat, image, prompts, text, video

PIECES = st.one_of(
    st.builds(text, st.integers(1, 5)),
    st.builds(lambda r, c: image(2 * r, 2 * c), st.integers(1, 6), st.integers(1, 6)),
    st.builds(lambda f, r, c: video(f, 2 * r, 2 * c), st.integers(1, 4), st.integers(1, 4), st.integers(1, 4)),
)
ROWS = st.lists(st.lists(PIECES, min_size=1, max_size=5), min_size=1, max_size=3)


def ours(batch: Prompts, **options: Any) -> Tensor:
    return prompt_positions(
        CONFIG, batch.ids, image_grids=batch.grids("image"), video_grids=batch.grids("video"), **options
    )


def counted(row: list[Piece]) -> tuple[list[tuple[int, int, int]], int]:
    """The positions of one row, and the first free one, by the definition."""
    out, free = [], 0
    for piece in flat(row):
        if piece.kind == "text":
            for _ in range(piece.tokens):
                out.append((free, free, free))
                free += 1
            continue
        rows, columns = piece.grid[1] // 2, piece.grid[2] // 2
        for i in range(rows):
            for j in range(columns):
                out.append((free, free + i, free + j))
        free += max(rows, columns)
    return out, free


@given(ROWS, st.booleans())
@settings(deadline=None, max_examples=60)
def test_positions_equal_those_counted_piece_by_piece(rows: list[list[Piece]], left: bool) -> None:
    batch = prompts(rows, left=left)
    got = ours(batch, attention_mask=batch.mask)
    for number, row in enumerate(rows):
        expected, _ = counted(row)
        assert list(map(tuple, got[:, number, batch.mask[number].bool()].T.tolist())) == expected


class Upstream:
    """What ``get_rope_index`` needs of a model; building a whole one for every example would be slow."""

    def __init__(self) -> None:
        self.config = Qwen3_5MoeConfig(**tiny_multimodal.config_json())

    get_rope_index = Qwen3_5MoeModel.get_rope_index
    get_vision_position_ids = Qwen3_5MoeModel.get_vision_position_ids


@given(ROWS, st.booleans())
@settings(deadline=None, max_examples=60)
def test_positions_equal_those_of_transformers(rows: list[list[Piece]], left: bool) -> None:
    batch = prompts(rows, left=left)
    grids = {kind: torch.tensor(batch.grids(kind)) if batch.grids(kind) else None for kind in ("image", "video")}
    expected, deltas = Upstream().get_rope_index(
        batch.ids, token_kinds(CONFIG, batch.ids), grids["image"], grids["video"], attention_mask=batch.mask
    )
    assert torch.equal(ours(batch, attention_mask=batch.mask), expected)
    free = [counted(row)[1] for row in rows]
    assert (batch.mask.sum(1) + deltas[:, 0]).tolist() == free


@given(ROWS, st.integers(0, 1000))
@settings(deadline=None, max_examples=25)
def test_positions_count_on_from_each_rows_start(rows: list[list[Piece]], first: int) -> None:
    batch = prompts(rows)
    start = first + torch.arange(len(rows))
    moved = ours(batch, attention_mask=batch.mask, start=start) - start[:, None]
    real = batch.mask.bool()
    assert torch.equal(moved[:, real], ours(batch, attention_mask=batch.mask)[:, real])


def test_images_side_by_side_are_told_apart_by_their_grids() -> None:
    ids = torch.tensor([[5, *[CONFIG.image_token_id] * 5, 6]])
    got = prompt_positions(CONFIG, ids, image_grids=[(1, 2, 4), (1, 6, 2)])
    assert got[0, 0].tolist() == [0, 1, 1, 3, 3, 3, 6]
    assert got[1, 0].tolist() == [0, 1, 1, 3, 4, 5, 6]
    assert got[2, 0].tolist() == [0, 1, 2, 3, 3, 3, 6]


def test_prompts_of_other_sizes_of_merger() -> None:
    vision = {**tiny_multimodal.VISION, "spatial_merge_size": 3}
    config = ModelConfig.from_dict(tiny_multimodal.config_json(vision_config=vision))
    got = prompt_positions(config, torch.tensor([[*[410] * 2, 7]]), image_grids=[(1, 3, 6)])
    assert got[:, 0].tolist() == [[0, 0, 2], [0, 0, 2], [0, 1, 2]]


@pytest.mark.parametrize(("tokens", "grids", "words"), [
    (3, [(1, 4, 4)], r"3 image tokens.*1 image grids \[\[1, 4, 4\]\] make 4 embeddings"),
    (5, [(1, 4, 4)], "5 image tokens.*make 4"),
    (4, [], "4 image tokens.*0 image grids.*make 0"),
    (4, [(1, 4, 3)], "multiples of 2"),
    (4, [(2, 2, 4)], "2 frames are a video"),
])  # fmt: skip
def test_tokens_and_grids_that_disagree_are_named(tokens: int, grids: list[Grid], words: str) -> None:
    ids = torch.tensor([[3] + tokens * [CONFIG.image_token_id]])
    with pytest.raises(VisionInputError, match=words):
        prompt_positions(CONFIG, ids, image_grids=grids)


def test_a_frame_cannot_be_split() -> None:
    ids = torch.tensor([[*[CONFIG.video_token_id] * 3, 9, CONFIG.video_token_id]])
    with pytest.raises(VisionInputError, match=r"prompt 0 has 3 video tokens.*the last 1.*frame of 1 x 2"):
        prompt_positions(CONFIG, ids, video_grids=[(2, 2, 4)])


def test_image_tokens_under_padding_do_not_count() -> None:
    ids = torch.tensor([[CONFIG.image_token_id, CONFIG.image_token_id, 4]])
    mask = torch.tensor([[0, 1, 1]])
    assert prompt_positions(CONFIG, ids, image_grids=[(1, 2, 2)], attention_mask=mask)[0, 0].tolist() == [0, 0, 1]
    with pytest.raises(VisionInputError, match="1 image tokens"):
        prompt_positions(CONFIG, ids, image_grids=[(1, 2, 4)], attention_mask=mask)


def test_a_text_model_has_no_pictures() -> None:
    with pytest.raises(VisionInputError, match="no vision tower"):
        prompt_positions(ModelConfig.from_dict(tiny.config_json()), torch.zeros(1, 1, dtype=torch.int64))
