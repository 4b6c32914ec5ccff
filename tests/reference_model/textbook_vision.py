"""The vision tower as loops over frames, patches and heads, in fp64: slow, plain, sharing no code with the model.

A video is [pictures, C, height, width]; everything else is a list of one-dimensional tensors, ``x[p]`` is patch p.
"""

from __future__ import annotations

import cmath
import math
from collections.abc import Iterator, Mapping
from fractions import Fraction
from typing import Any

import torch
from torch import Tensor

from tests.reference_model.textbook import Weights, part

Config = Mapping[str, Any]
Place = tuple[int, int, int]


def places(config: Config, grid: tuple[int, int, int]) -> Iterator[Place]:
    """Frame, row and column of every patch, merged neighbours one after another."""
    m = config["spatial_merge_size"]
    for frame in range(grid[0]):
        for top in range(0, grid[1], m):
            for left in range(0, grid[2], m):
                for row in range(top, top + m):
                    for column in range(left, left + m):
                        yield frame, row, column


def patch(config: Config, video: Tensor, place: Place) -> Tensor:
    """The pixels of one patch, [C, pictures, size, size]."""
    pictures, size = config["temporal_patch_size"], config["patch_size"]
    frame, row, column = place
    cut = video[frame * pictures : (frame + 1) * pictures]
    return cut[:, :, row * size : (row + 1) * size, column * size : (column + 1) * size].transpose(0, 1)


def tower(config: Config, weights: Weights, videos: list[tuple[Tensor, tuple[int, int, int]]]) -> Tensor:
    """[P / m^2, O] of videos and their grids, one after another; an image has its picture twice."""
    w = {name: tensor.double() for name, tensor in weights.items()}
    return torch.cat([_one(config, w, video.double(), grid) for video, grid in videos])


def _one(config: Config, w: Weights, video: Tensor, grid: tuple[int, int, int]) -> Tensor:
    patches = torch.stack([patch(config, video, place).flatten() for place in places(config, grid)])
    return torch.stack(tower_of_patches(config, w, patches, grid))


def tower_of_patches(config: Config, weights: Weights, patches: Tensor, grid: tuple[int, int, int]) -> list[Tensor]:
    """Embeddings of one video whose patches are rows already."""
    w = {name: tensor.double() for name, tensor in weights.items()}
    where = list(places(config, grid))
    x = []
    for pixels, place in zip(patches.double(), where, strict=True):
        filtered = w["patch_embed.proj.weight"].flatten(1) @ pixels
        x.append(filtered + w["patch_embed.proj.bias"] + learned(w["pos_embed.weight"], place, grid))
    for n in range(config["depth"]):
        block = part(w, f"blocks.{n}.")
        mixed = attention(config, part(block, "attn."), [layer_norm(p, part(block, "norm1.")) for p in x], where)
        x = [a + b for a, b in zip(x, mixed, strict=True)]
        for i, p in enumerate(x):
            inner = linear(layer_norm(p, part(block, "norm2.")), part(block, "mlp.linear_fc1."))
            x[i] = p + linear(gelu_tanh(inner), part(block, "mlp.linear_fc2."))
    out = []
    together = config["spatial_merge_size"] ** 2
    for first in range(0, len(x), together):
        side_by_side = torch.cat([layer_norm(p, part(w, "merger.norm.")) for p in x[first : first + together]])
        inner = linear(side_by_side, part(w, "merger.linear_fc1."))
        out.append(linear(gelu_exact(inner), part(w, "merger.linear_fc2.")))
    return out


def shares(at: int, size: int, side: int) -> list[tuple[int, Fraction]]:
    """The points of a table's axis around place ``at`` of ``size``, corners on corners, and what each gives."""
    exact = Fraction(at * (side - 1), max(size - 1, 1))
    return [(i, 1 - abs(exact - i)) for i in range(side) if abs(exact - i) < 1]


def corners(side: int, place: Place, grid: tuple[int, int, int]) -> list[tuple[int, float]]:
    """The entries of a square table around a place, at most four, and their weights."""
    return [
        (i * side + j, float(row_share * column_share))
        for i, row_share in shares(place[1], grid[1], side)
        for j, column_share in shares(place[2], grid[2], side)
    ]


def padded_corners(config: Config, grids: list[tuple[int, int, int]]) -> tuple[Tensor, Tensor]:
    """Entries of the table around every patch and their fp64 weights, both [P, 4], for engines that take them."""
    side = math.isqrt(config["num_position_embeddings"])
    found = [corners(side, place, grid) for grid in grids for place in places(config, grid)]
    padded = [around + (4 - len(around)) * [(0, 0.0)] for around in found]
    entries = torch.tensor([[entry for entry, _ in around] for around in padded])
    return entries, torch.tensor([[weight for _, weight in around] for around in padded], dtype=torch.float64)


def learned(table: Tensor, place: Place, grid: tuple[int, int, int]) -> Tensor:
    """The table's vector at a place, between its points."""
    side = round(table.shape[0] ** 0.5)
    out = torch.zeros(table.shape[1], dtype=torch.float64)
    for entry, weight in corners(side, place, grid):
        out += weight * table[entry].double()
    return out


def rotated(config: Config, head: Tensor, place: Place) -> Tensor:
    """Dimensions k and k + K/2 as a complex number, turned by the row for the first half of k, then by the column."""
    planes = len(head) // 2
    theta = (config.get("rope_parameters") or {}).get("rope_theta", 10_000.0)
    out = head.clone()
    for k in range(planes):
        axis, i = divmod(k, planes // 2)
        # fp32 on purpose: angles are fp32 products in every engine
        frequency = 1 / torch.tensor(theta, dtype=torch.float32) ** torch.tensor(2 * i / planes, dtype=torch.float32)
        angle = frequency * place[1 + axis]
        turned = complex(head[k], head[k + planes]) * complex(float(torch.cos(angle)), float(torch.sin(angle)))
        out[k], out[k + planes] = turned.real, turned.imag
    return out


def rotated_exactly(theta: float, head: Tensor, place: Place) -> Tensor:
    """The same in fp64 throughout."""
    planes = len(head) // 2
    out = head.clone()
    for k in range(planes):
        axis, i = divmod(k, planes // 2)
        turned = complex(head[k], head[k + planes]) * cmath.exp(1j * place[1 + axis] * theta ** (-2 * i / planes))
        out[k], out[k + planes] = turned.real, turned.imag
    return out


def attention(config: Config, w: Weights, x: list[Tensor], where: list[Place]) -> list[Tensor]:
    heads = config["num_heads"]
    width = len(x[0]) // heads
    rows = [linear(p, part(w, "qkv.")).view(3, heads, width) for p in x]
    turned = [
        [[rotated(config, row[i][h], place) for h in range(heads)] for i in (0, 1)]
        for row, place in zip(rows, where, strict=True)
    ]
    out = []
    for i, place in enumerate(where):
        together = [j for j, other in enumerate(where) if other[0] == place[0]]
        mixed = []
        for h in range(heads):
            scores = [float(turned[i][0][h] @ turned[j][1][h]) / math.sqrt(width) for j in together]
            top = max(scores)
            powers = [math.exp(s - top) for s in scores]
            values = zip(powers, together, strict=True)
            mixed.append(sum((p / sum(powers) * rows[j][2][h] for p, j in values), torch.zeros(width).double()))
        out.append(linear(torch.cat(mixed), part(w, "proj.")))
    return out


def linear(x: Tensor, w: Weights) -> Tensor:
    return w["weight"] @ x + w["bias"]


def layer_norm(x: Tensor, w: Weights) -> Tensor:
    centred = x - float(x.mean())
    return centred / math.sqrt(float((centred**2).mean()) + 1e-6) * w["weight"] + w["bias"]


def gelu_tanh(x: Tensor) -> Tensor:
    return x / 2 * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))


def gelu_exact(x: Tensor) -> Tensor:
    return torch.tensor([float(v) * (1 + math.erf(float(v) / math.sqrt(2))) / 2 for v in x], dtype=torch.float64)
