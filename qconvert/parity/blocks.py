"""Sums over the blocks that share a scale: what tells a wrong scale from rounding."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import pad

from qconvert.core.scheme import Block, Blocking, Channel, Flat, Group, PerTensor
from qconvert.numerics.error import ErrorSums


@dataclass(frozen=True, slots=True, kw_only=True)
class BlockSums:
    """For every block of a [N, K] matrix w and its approximation v, in the shape of the scales, float64.

    Attributes:
        signal: sum of ``w**2``.
        approximated: sum of ``v**2``.
        product: sum of ``w * v``.
        squared_error: sum of ``(w - v)**2``.
        max_error: largest ``|w - v|`` of all blocks; NaN as soon as one element is.
        elements: N * K.
    """

    signal: Tensor
    approximated: Tensor
    product: Tensor
    squared_error: Tensor
    max_error: float
    elements: int

    @property
    def total(self) -> ErrorSums:
        """The sums of the whole matrix."""
        return ErrorSums(
            elements=self.elements,
            signal=float(self.signal.sum()),
            approximated=float(self.approximated.sum()),
            product=float(self.product.sum()),
            squared_error=float(self.squared_error.sum()),
            max_error=self.max_error,
        )

    @property
    def ratio(self) -> Tensor:
        """``<w, v> / <w, w>``: the factor between the two; NaN for a block of zeros."""
        return self.product / self.signal.where(self.signal > 0, torch.nan)

    @property
    def cosine(self) -> Tensor:
        """``<w, v> / (|w| |v|)``; NaN for a block of zeros."""
        norms = (self.signal * self.approximated).sqrt()
        return self.product / norms.where(norms > 0, torch.nan)


def joined(runs: Sequence[BlockSums]) -> BlockSums:
    """The sums of a matrix from those of its runs of rows, which begin where blocks begin."""
    if len(runs) == 1:
        return runs[0]
    worst = [run.max_error for run in runs]
    return BlockSums(
        signal=torch.cat([run.signal for run in runs]),
        approximated=torch.cat([run.approximated for run in runs]),
        product=torch.cat([run.product for run in runs]),
        squared_error=torch.cat([run.squared_error for run in runs]),
        max_error=math.nan if any(math.isnan(value) for value in worst) else max(worst),
        elements=sum(run.elements for run in runs),
    )


def block_sums(w: Tensor, v: Tensor, blocking: Blocking | None) -> BlockSums:
    """Compare two float32 tensors of one shape block by block; ``None`` takes a block per row, or for a whole vector.

    Products are summed in float32 inside a block and in float64 across.
    """
    error = w - v
    return BlockSums(
        signal=sums_by_block(w * w, blocking),
        approximated=sums_by_block(v * v, blocking),
        product=sums_by_block(w * v, blocking),
        squared_error=sums_by_block(error * error, blocking),
        max_error=float(error.abs_().max()) if error.numel() else 0.0,
        elements=w.numel(),
    )


def sums_by_block(x: Tensor, blocking: Blocking | None) -> Tensor:
    """Float64 sums of the blocks of a matrix in the shape of the scales; see ``block_sums``."""
    match blocking:
        case None:
            sums = x.reshape(1, -1).sum(1, keepdim=True) if x.dim() < 2 else x.flatten(1).sum(1, keepdim=True)
        case PerTensor():
            sums = x.sum(1, keepdim=True).to(torch.float64).sum(0, keepdim=True)
        case Channel():
            sums = x.sum(1, keepdim=True)
        case Group(size=size):
            sums = _by_columns(x, size)
        case Block(rows=rows, cols=cols):
            tiles = _by_columns(pad(x, (0, 0, 0, -x.shape[0] % rows)), cols)
            sums = tiles.view(tiles.shape[0] // rows, rows, -1).sum(1)
        case Flat(size=size):
            sums = _by_columns(x.reshape(1, -1), size).view(-1)
    return sums.to(torch.float64)


def _by_columns(x: Tensor, size: int) -> Tensor:
    """Sums over runs of ``size`` columns, [N, ceil(K / size)]."""
    padded = pad(x, (0, -x.shape[1] % size))
    return padded.view(x.shape[0], padded.shape[1] // size, size).sum(2)


def describe_block(index: tuple[int, ...], blocking: Blocking | None, shape: tuple[int, ...]) -> str:
    """The block at ``index`` of the scales in words, for example ``row 5, columns 64 to 95``."""
    match blocking, index:
        case Channel(), (row, *_):
            return f"row {row}"
        case Group(size=size), (row, group):
            return f"row {row}, columns {group * size} to {min(shape[-1], (group + 1) * size) - 1}"
        case Block(rows=rows, cols=cols), (row, col):
            return (
                f"rows {row * rows} to {min(shape[0], (row + 1) * rows) - 1}, "
                f"columns {col * cols} to {min(shape[-1], (col + 1) * cols) - 1}"
            )
        case Flat(size=size), (block,):
            return f"elements {block * size} to {(block + 1) * size - 1} in row-major order"
        case None, (row, *_) if len(shape) > 1:
            return f"row {row}"
    return "the whole tensor"
