"""Time, height and width of every token of a prompt with images and videos.

Text takes the next number on all three axes. An image that begins at s gives the token at row i and column j (patches
are already merged) the position (s, s + i, s + j), and text goes on at s + max(rows, columns): an image takes fewer
numbers than it has tokens.

The frames of a video stand apart in the prompt, each between markers of its own and behind its time in words
(``<1.5 seconds>``). So every frame is placed like an image: the time axis does not count frames or seconds, the text
between them tells the time.

Shapes: B batch, T tokens.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from reference_model.config import ModelConfig
from reference_model.span import check_ids, check_places
from reference_model.vision import Grid, VisionInputError, check_grids

TEXT, IMAGE, VIDEO = 0, 1, 2
NAMES = {IMAGE: "image", VIDEO: "video"}


def token_kinds(config: ModelConfig, input_ids: Tensor) -> Tensor:
    """TEXT, IMAGE or VIDEO for every id, int64 [B, T]: what its embedding is made from."""
    kinds = torch.full_like(input_ids, TEXT)
    for kind, token in ((IMAGE, config.image_token_id), (VIDEO, config.video_token_id)):
        if token is not None:
            kinds = kinds.masked_fill(input_ids == token, kind)
    return kinds


def prompt_positions(
    config: ModelConfig,
    input_ids: Tensor,
    *,
    image_grids: Sequence[Grid] = (),
    video_grids: Sequence[Grid] = (),
    attention_mask: Tensor | None = None,
    start: Tensor | None = None,
) -> Tensor:
    """Positions int64 [3, B, T] of prompts [B, T] whose images and videos follow each other row by row.

    ``start`` int64 [B] is the first free position of each row, 0 by default. Tokens whose ``attention_mask`` [B, T] is
    zero are padding: they do not count, and have the position 0.

    Raises:
        VisionInputError: grids that the merger does not divide, an image of several frames, or grids that do not fill
            the image and video tokens exactly.
        ValueError: ids, mask or ``start`` do not fit each other.
    """
    if config.vision is None:
        raise VisionInputError("the model has no vision tower, so that its prompts are text alone")
    merge = config.vision.spatial_merge_size
    check_ids(config.text, input_ids)
    check_places(input_ids.shape, attention_mask)
    if start is not None and start.shape != input_ids.shape[:1]:
        raise ValueError(
            f"start is of {len(start)} rows, the prompts are {len(input_ids)}: the cache is of another batch"
        )
    real = torch.ones_like(input_ids).bool() if attention_mask is None else attention_mask.bool()
    kinds = token_kinds(config, input_ids).masked_fill(~real, TEXT)
    frames = {}
    for kind, grids in ((IMAGE, image_grids), (VIDEO, video_grids)):
        check_count(kinds, kind, grids, merge)
        frames[kind] = _frames(grids, merge)
    positions = torch.zeros_like(input_ids).repeat(3, 1, 1)
    for number, row in enumerate(kinds):
        begin = 0 if start is None else int(start[number])
        positions[:, number, real[number]] = _row(row[real[number]], begin, frames, number)
    return positions


def check_count(kinds: Tensor, kind: int, grids: Sequence[Grid], merge: int) -> None:
    """Raise ``VisionInputError`` unless the grids are of this kind, and the prompts have a token for each embedding."""
    check_grids(grids, merge, one_frame=kind == IMAGE)
    tokens = int((kinds == kind).sum())
    embeddings = sum(frames * (rows // merge) * (columns // merge) for frames, rows, columns in grids)
    if tokens != embeddings:
        raise VisionInputError(
            f"the prompts have {tokens} {NAMES[kind]} tokens, but the {len(grids)} {NAMES[kind]} grids "
            f"{[list(grid) for grid in grids]} make {embeddings} embeddings, one for {merge} x {merge} patches"
        )


def _frames(grids: Sequence[Grid], merge: int) -> Iterator[tuple[int, int]]:
    """Rows and columns of tokens, frame after frame."""
    for frames, rows, columns in grids:
        for _ in range(frames):
            yield rows // merge, columns // merge


def _row(kinds: Tensor, at: int, frames: dict[int, Iterator[tuple[int, int]]], number: int) -> Tensor:
    """Positions [3, T] of one prompt; takes its frames from the iterators."""
    parts = []
    values, counts = torch.unique_consecutive(kinds, return_counts=True)
    for kind, count in zip(values.tolist(), counts.tolist(), strict=True):
        left = count
        if kind == TEXT:
            parts.append(torch.arange(at, at + count, device=kinds.device).expand(3, count))
            at, left = at + count, 0
        while left:
            rows, columns = next(frames[kind])
            if rows * columns > left:
                raise VisionInputError(
                    f"prompt {number} has {count} {NAMES[kind]} tokens in a row; the last {left} of them should be a "
                    f"frame of {rows} x {columns}"
                )
            parts.append(_rectangle(at, rows, columns, kinds.device))
            at, left = at + max(rows, columns), left - rows * columns
    return torch.cat(parts, dim=1) if parts else kinds.new_zeros(3, 0)


def _rectangle(at: int, rows: int, columns: int, device: torch.device) -> Tensor:
    """One moment at ``at``, rows and columns from there: [3, rows * columns]."""
    row = torch.arange(rows, device=device).view(-1, 1).expand(rows, columns)
    column = torch.arange(columns, device=device).expand(rows, columns)
    return at + torch.stack((torch.zeros_like(row), row, column)).flatten(1)
