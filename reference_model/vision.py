"""The vision tower: pixels of image patches to embeddings that take the place of image tokens.

Patches come in the order of the merger: blocks of m x m neighbours one after another, row by row, frame by frame.

Shapes: P patches, C channels, D width of the tower, N heads, K head width, m merge size, O width of the decoder.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

from reference_model.config import VisionConfig

NORM_EPS = 1e-6

Grid = tuple[int, int, int]
"""Frames (pairs of video frames; 1 for an image), rows and columns of patches."""


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
    """Full attention inside a frame: ``proj(softmax(q k^T / sqrt(K)) v)``, q and k rotated by row and column."""

    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        self.heads = config.num_heads
        self.qkv = nn.Linear(config.hidden_size, 3 * config.hidden_size)
        self.proj = nn.Linear(config.hidden_size, config.hidden_size)

    def forward(self, x: Tensor, angles: Tensor, frame_sizes: list[int]) -> Tensor:
        """Mix x [P, D] inside every frame; angles [P, K], frame_sizes sum to P."""
        q, k, v = self.qkv(x).unflatten(-1, (3, self.heads, -1)).unbind(1)
        q, k = _rotate(q, angles), _rotate(k, angles)
        frames = zip(*(torch.split(part, frame_sizes) for part in (q, k, v)), strict=True)
        mixed = [
            functional.scaled_dot_product_attention(*(part.transpose(0, 1).unsqueeze(0) for part in frame))
            for frame in frames
        ]
        out: Tensor = self.proj(torch.cat([frame[0].transpose(0, 1) for frame in mixed]).flatten(1))
        return out


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

    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(config.hidden_size, eps=NORM_EPS)
        self.norm2 = nn.LayerNorm(config.hidden_size, eps=NORM_EPS)
        self.attn = VisionAttention(config)
        self.mlp = VisionMlp(config)

    def forward(self, x: Tensor, angles: Tensor, frame_sizes: list[int]) -> Tensor:
        """[P, D] -> [P, D]."""
        x = x + self.attn(self.norm1(x), angles, frame_sizes)
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

    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        self.config = config
        self.patch_embed = PatchEmbed(config)
        self.pos_embed = nn.Embedding(config.num_position_embeddings, config.hidden_size)
        self.blocks = nn.ModuleList(VisionBlock(config) for _ in range(config.depth))
        self.merger = PatchMerger(config)

    def forward(self, pixels: Tensor, grids: list[Grid]) -> Tensor:
        """Embed images, one after another in ``pixels`` [P, C * frames * size * size]: [P / m^2, O]."""
        places = [_places(rows, columns, self.config.spatial_merge_size) for _, rows, columns in grids]
        learned = [
            self._positions(place, rows, columns).repeat(frames, 1)
            for place, (frames, rows, columns) in zip(places, grids, strict=True)
        ]
        angles = torch.cat([self._angles(place).repeat(grid[0], 1) for place, grid in zip(places, grids, strict=True)])
        frame_sizes = [rows * columns for frames, rows, columns in grids for _ in range(frames)]
        x = self.patch_embed(pixels)
        x = x + torch.cat(learned).to(x.dtype)
        for block in self.blocks:
            x = block(x, angles, frame_sizes)
        out: Tensor = self.merger(x)
        return out

    def _positions(self, place: Tensor, rows: int, columns: int) -> Tensor:
        """The learned square grid stretched to rows x columns, corners on corners, between points bilinear: [P, D]."""
        side = int(self.config.num_position_embeddings**0.5)
        low, share = [], []
        for axis, size in enumerate((rows, columns)):
            at = torch.linspace(0, side - 1, size)[place[:, axis]]
            low.append(at.long())
            share.append((at - low[-1]).unsqueeze(-1))
        high = [(index + 1).clamp(max=side - 1) for index in low]
        table = self.pos_embed.weight
        upper = table[low[0] * side + low[1]] * (1 - share[1]) + table[low[0] * side + high[1]] * share[1]
        lower = table[high[0] * side + low[1]] * (1 - share[1]) + table[high[0] * side + high[1]] * share[1]
        return upper * (1 - share[0]) + lower * share[0]

    def _angles(self, place: Tensor) -> Tensor:
        """Rotary angles [P, K]: K / 4 frequencies of the row, K / 4 of the column, and the same again."""
        quarter = self.config.head_dim // 4
        frequencies = self.config.rope_theta ** -(torch.arange(quarter, dtype=torch.float32) / quarter)
        return (place.unsqueeze(-1).float() * frequencies).flatten(1).repeat(1, 2)


def _places(rows: int, columns: int, merge: int) -> Tensor:
    """Row and column of every patch of a frame in the merger's order, int64 [rows * columns, 2]."""
    row = torch.arange(rows).view(-1, 1).expand(rows, columns)
    column = torch.arange(columns).expand(rows, columns)
    both = torch.stack((row, column), dim=-1).view(rows // merge, merge, columns // merge, merge, 2)
    return both.transpose(1, 2).reshape(-1, 2)


def _rotate(x: Tensor, angles: Tensor) -> Tensor:
    """Rotate x [P, N, K] by angles [P, K], dimension k with k + K / 2; in fp32."""
    wide = x.float()
    first, second = wide.chunk(2, dim=-1)
    turned = torch.cat((-second, first), dim=-1)
    return (wide * angles.cos().unsqueeze(1) + turned * angles.sin().unsqueeze(1)).to(x.dtype)


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
