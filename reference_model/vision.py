"""The vision tower: pixels of image patches to embeddings that take the place of image tokens.

An image, or two consecutive pictures of a video, is a frame: rows x columns patches, each a block of pixels over both
pictures (an image counts twice). Patches come in the order of the merger: blocks of m x m neighbours one after another,
row by row, frame by frame. Frames do not see each other; what a video is, the decoder has to make of its frames.

Shapes: P patches, C channels, D width of the tower, N heads, K head width, m merge size, O width of the decoder.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional

from reference_model.attention import AttentionKind, known_kind
from reference_model.config import VisionConfig
from reference_model.norm import widen
from reference_model.rope import Rotation, rotate

NORM_EPS = 1e-6

Grid = tuple[int, int, int]
"""Frames (1 for an image), rows and columns of patches."""


class VisionInputError(ValueError):
    """Pixels, grids and image tokens that contradict each other; the message says which."""


class PatchEmbed(nn.Module):
    """One product per patch: ``proj`` [D, C, frames, size, size] over the patch's pixels."""

    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        kernel = (config.temporal_patch_size, config.patch_size, config.patch_size)
        self.proj = nn.Conv3d(config.in_channels, config.hidden_size, kernel, stride=kernel)

    def forward(self, pixels: Tensor) -> Tensor:
        """[P, C * frames * size * size] -> [P, D]."""
        weight = self.proj.weight.flatten(1)
        return functional.linear(pixels.to(weight.dtype), weight, self.proj.bias)


class VisionAttention(nn.Module):
    """Full attention inside a frame: ``proj(softmax(q k^T / sqrt(K)) v)``, q and k rotated by row and column.

    ``qkv`` [3 D, D] gives queries, keys and values of all heads one after another.
    """

    def __init__(self, config: VisionConfig, kind: AttentionKind = "sdpa") -> None:
        super().__init__()
        self.kind = known_kind(kind)
        self.heads = config.num_heads
        self.qkv = nn.Linear(config.hidden_size, 3 * config.hidden_size)
        self.proj = nn.Linear(config.hidden_size, config.hidden_size)

    def forward(self, x: Tensor, by: Rotation, grids: Sequence[Grid]) -> Tensor:
        """Mix x [P, D] inside every frame of the grids."""
        q, k, v = self.qkv(x).view(1, x.shape[0], 3, self.heads, -1).unbind(2)
        # The angles are fp32 and make the rotation so, also in a model of 16 bits.
        q, k = (rotate(part, by).to(x.dtype) for part in (q, k))
        pictures = zip(*(_pictures(part[0], grids) for part in (q, k, v)), strict=True)
        mixed = [attend(queries, keys, values, self.kind).flatten(0, 1) for queries, keys, values in pictures]
        out: Tensor = self.proj(torch.cat(mixed).flatten(1))
        return out


def _pictures(x: Tensor, grids: Sequence[Grid]) -> list[Tensor]:
    """Cut [P, N, K] into images and videos, and those into their frames: [F, P / F, N, K] each."""
    parts = torch.split(x, [math.prod(grid) for grid in grids])
    return [part.view(grid[0], -1, *part.shape[1:]) for part, grid in zip(parts, grids, strict=True)]


def attend(queries: Tensor, keys: Tensor, values: Tensor, kind: AttentionKind) -> Tensor:
    """``softmax(q k^T / sqrt(K)) v`` for all [F, P, N, K], every one of the F frames alone.

    ``plain`` writes the formula out, with the softmax in at least fp32; ``sdpa`` leaves it to torch.
    """
    q, k, v = (x.transpose(1, 2) for x in (queries, keys, values))
    if kind == "sdpa":
        out = functional.scaled_dot_product_attention(q, k, v)
    else:
        scores = (q @ k.transpose(-1, -2)) / math.sqrt(q.shape[-1])
        out = widen(scores).softmax(-1).to(q.dtype) @ v
    return out.transpose(1, 2)


class VisionMlp(nn.Module):
    """``linear_fc2(gelu(linear_fc1(x)))``, the gelu in its tanh form."""

    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        self.linear_fc1 = nn.Linear(config.hidden_size, config.intermediate_size)
        self.linear_fc2 = nn.Linear(config.intermediate_size, config.hidden_size)

    def forward(self, x: Tensor) -> Tensor:
        """[P, D] -> [P, D]."""
        out: Tensor = self.linear_fc2(functional.gelu(self.linear_fc1(x), approximate="tanh"))
        return out


class VisionBlock(nn.Module):
    """``h = x + attn(norm1(x))``, then ``h + mlp(norm2(h))``."""

    def __init__(self, config: VisionConfig, attention: AttentionKind = "sdpa") -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(config.hidden_size, eps=NORM_EPS)
        self.norm2 = nn.LayerNorm(config.hidden_size, eps=NORM_EPS)
        self.attn = VisionAttention(config, attention)
        self.mlp = VisionMlp(config)

    def forward(self, x: Tensor, by: Rotation, grids: Sequence[Grid]) -> Tensor:
        """[P, D] -> [P, D]."""
        x = x + self.attn(self.norm1(x), by, grids)
        out: Tensor = x + self.mlp(self.norm2(x))
        return out


class PatchMerger(nn.Module):
    """``linear_fc2(gelu(linear_fc1(m x m normed neighbours side by side)))``, the gelu exact."""

    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(config.hidden_size, eps=NORM_EPS)
        self.linear_fc1 = nn.Linear(config.merged_size, config.merged_size)
        self.linear_fc2 = nn.Linear(config.merged_size, config.out_hidden_size)

    def forward(self, x: Tensor) -> Tensor:
        """[P, D] -> [P / m^2, O]."""
        side_by_side = self.norm(x).view(-1, self.linear_fc1.in_features)
        out: Tensor = self.linear_fc2(functional.gelu(self.linear_fc1(side_by_side)))
        return out


class VisionTower(nn.Module):
    """Patches to decoder embeddings; ``state_dict`` keys are checkpoint names without ``model.visual.``."""

    def __init__(self, config: VisionConfig, attention: AttentionKind = "sdpa") -> None:
        super().__init__()
        self.config = config
        self.patch_embed = PatchEmbed(config)
        self.pos_embed = nn.Embedding(config.num_position_embeddings, config.hidden_size)
        self.blocks = nn.ModuleList(VisionBlock(config, attention) for _ in range(config.depth))
        self.merger = PatchMerger(config)

    def forward(self, pixels: Tensor, grids: Sequence[Grid]) -> Tensor:
        """Embed images and videos, one after another in ``pixels`` [P, C * pictures * size * size]: [P / m^2, O].

        Raises:
            VisionInputError: rows or columns that the merger does not divide, or pixels that do not fill the grids.
        """
        self._check(pixels, grids)
        m = self.config.spatial_merge_size
        places = [patch_places(rows, columns, m).to(pixels.device) for _, rows, columns in grids]
        learned = [
            interpolate(self.pos_embed.weight, place, rows, columns).repeat(frames, 1)
            for place, (frames, rows, columns) in zip(places, grids, strict=True)
        ]
        everywhere = torch.cat([place.repeat(grid[0], 1) for place, grid in zip(places, grids, strict=True)])
        by = axial_rotation(self.config, everywhere)
        x = self.patch_embed(pixels)
        x = x + torch.cat(learned).to(x.dtype)
        for block in self.blocks:
            x = block(x, by, grids)
        out: Tensor = self.merger(x)
        return out

    def _check(self, pixels: Tensor, grids: Sequence[Grid]) -> None:
        check_grids(grids, self.config.spatial_merge_size)
        if not grids:
            raise VisionInputError("there are no grids: without images or videos there is nothing to embed")
        expected = [sum(math.prod(grid) for grid in grids), self.patch_embed.proj.weight[0].numel()]
        if list(pixels.shape) != expected or not pixels.is_floating_point():
            raise VisionInputError(
                f"pixels are {pixels.dtype} {list(pixels.shape)}; the {len(grids)} grids {[list(g) for g in grids]} "
                f"need floating-point {expected}: one row a patch, with channels x pictures x height x width in it"
            )


def check_grids(grids: Sequence[Grid], merge: int, *, one_frame: bool = False) -> None:
    """Raise ``VisionInputError`` for what is no grid, has no frames, or rows or columns that ``merge`` does not divide.

    ``one_frame`` refuses several frames as well: an image has one.
    """
    for number, grid in enumerate(grids):
        if len(grid) != 3 or not all(isinstance(size, int) for size in grid):
            raise VisionInputError(
                f"grid {number} is {grid!r}: expected frames, rows and columns as three whole numbers"
            )
        if min(grid) < 1 or grid[1] % merge or grid[2] % merge:
            raise VisionInputError(
                f"grid {number} is {list(grid)}: expected at least one frame, and rows and columns of patches "
                f"that are multiples of {merge}, which the merger joins; resize the picture"
            )
        if one_frame and grid[0] != 1:
            raise VisionInputError(f"grid {number} of the images is {list(grid)}: {grid[0]} frames are a video")


def patch_places(rows: int, columns: int, merge: int) -> Tensor:
    """Row and column of every patch of a frame in the merger's order, int64 [rows * columns, 2]."""
    row = torch.arange(rows).view(-1, 1).expand(rows, columns)
    column = torch.arange(columns).expand(rows, columns)
    both = torch.stack((row, column), dim=-1).view(rows // merge, merge, columns // merge, merge, 2)
    return both.transpose(1, 2).reshape(-1, 2)


def interpolate(table: Tensor, places: Tensor, rows: int, columns: int) -> Tensor:
    """Learned positions of a square grid, stretched to rows x columns and read at ``places`` int64 [P, 2]: [P, D].

    Corners lie on corners: row r of R is at ``r (S - 1) / (R - 1)`` of the table [S * S, D], and takes from the four
    points around it by ``(1 - |distance of rows|) (1 - |distance of columns|)``. At least fp32.
    """
    side = math.isqrt(table.shape[0])
    wide = widen(table)
    indices, weights = [], []
    for axis, size in enumerate((rows, columns)):
        at = places[:, axis].to(wide.dtype) * (side - 1) / max(size - 1, 1)
        low = at.long()
        share = at - low
        indices.append((low, (low + 1).clamp(max=side - 1)))
        weights.append((1 - share, share))
    out = torch.zeros((), dtype=wide.dtype, device=table.device)
    for row in (0, 1):
        for column in (0, 1):
            weight = weights[0][row] * weights[1][column]
            out = out + wide[indices[0][row] * side + indices[1][column]] * weight.unsqueeze(-1)
    return out


def axial_rotation(config: VisionConfig, places: Tensor) -> Rotation:
    """Turn a head's first K / 4 planes by the row and the other K / 4 by the column of ``places`` int64 [P, 2].

    Both axes have the frequencies ``theta ** (-4 i / K)``; fp32, [1, P, K / 2]. Dimension k turns with k + K / 2.
    """
    frequencies = axial_frequencies(config).to(places.device)
    angles = (places.unsqueeze(-1).to(torch.float32) * frequencies).flatten(1).unsqueeze(0)
    return Rotation(cos=angles.cos(), sin=angles.sin())


def axial_frequencies(config: VisionConfig) -> Tensor:
    """Angles of one step along an axis, of its planes: ``theta ** (-4 i / K)``, fp32 [K / 4]."""
    quarter = config.head_dim // 4
    return 1.0 / config.rope_theta ** (torch.arange(quarter, dtype=torch.float32) / quarter)


def start_vision(tower: VisionTower, seed: int) -> None:
    """Random weights, the same for the same seed: matrices 1 / sqrt(inputs), positions 0.02, norms near one."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, weight in tower.named_parameters():
            norm = "norm" in name.split(".")[-2]
            if weight.ndim == 1:
                # Biases and norm weights differ from each other, so that a lost or swapped one shows.
                weight.normal_(1.0 if norm and name.endswith("weight") else 0.0, 0.02, generator=generator)
            else:
                deviation = 0.02 if name.startswith("pos_embed") else weight[0].numel() ** -0.5
                weight.normal_(0.0, deviation, generator=generator)
