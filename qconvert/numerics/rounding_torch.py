"""Rounding of one matrix written plainly in torch: for every device and blocking, and the oracle of the kernels."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from qconvert.core.errors import DataError, FormatError
from qconvert.core.quantized import QuantizedTensor
from qconvert.core.scheme import Block, Channel, Group, PerTensor, Scheme
from qconvert.numerics.rounding_rule import SEARCH_FACTORS, Rounded, Rule, describe_not_finite

CHUNK_ELEMENTS = 1 << 18
"""Elements rounded at a time: the float32 working set stays in a core's L2 cache."""


def quantize_with_torch(
    w: Tensor, scheme: Scheme, *, search: bool = False, importance: Tensor | None = None, second: float = 1.0
) -> Rounded:
    """What ``rounding.quantize`` returns, by plain tensor operations on the device of ``w``.

    ``importance`` [K], positive: what squared errors of each column count in the search, ``None`` is 1.

    Raises:
        DataError: ``w`` holds NaN or infinity.
        FormatError: a grid or blocking that is not available.
        ValueError: the group does not divide K.
    """
    rows, cols = w.shape
    rule = Rule(scheme=scheme, second=second)
    codes = torch.empty(rows, cols, dtype=rule.code_dtype, device=w.device)
    scale = torch.empty(scheme.scale_shape(rows, cols), dtype=scheme.scale.dtype.torch_dtype, device=w.device)
    zero_point = None if scheme.symmetric else torch.empty(scale.shape, dtype=torch.uint8, device=w.device)
    squared_error = signal = 0.0
    counts = None if importance is None else _blocked(importance[None], scheme)[0]
    for begin, end, first, last in _chunks(scheme, rows, cols):
        blocks, dims = _blocked(w[begin:end], scheme)
        extent, minimum = rule.range_of(blocks, dims)
        if not bool(torch.isfinite(extent).all()):
            raise DataError(describe_not_finite(w))
        block_scale, zero = _choose(rule, blocks, dims, extent, minimum, SEARCH_FACTORS if search else (1.0,), counts)
        values = rule.values(blocks, block_scale, zero)
        codes[begin:end] = _unblocked(rule.codes(values), scheme, end - begin, cols)
        squared_error += sum_of_squares(rule.residual(blocks, rule.meant(values), block_scale, zero))
        signal += sum_of_squares(blocks)
        scale[first:last] = block_scale.reshape(last - first, -1)
        if zero_point is not None and zero is not None:
            zero_point[first:last] = (zero + rule.shift).reshape(last - first, -1)
    quantized = QuantizedTensor(
        codes=codes,
        scale=scale,
        zero_point=zero_point,
        second_scale=rule.second_scale,
        scheme=scheme,
        shape=(rows, cols),
    )
    return Rounded(quantized=quantized, squared_error=squared_error, signal=signal)


def sum_of_squares(values: Tensor) -> float:
    """Sum of squares; float32 inside rows and float64 across, or float64 where float32 would leave its range."""
    flat = values.reshape(-1, values.shape[-1])
    total = float(torch.linalg.vector_norm(flat, dim=1).to(torch.float64).square_().sum())
    if 1e-20 < total < 1e30 or (total == 0.0 and not bool(flat.any())):
        return total
    return float(flat.to(torch.float64).square().sum())


def _choose(
    rule: Rule,
    blocks: Tensor,
    dims: tuple[int, ...],
    extent: Tensor,
    minimum: Tensor | None,
    factors: tuple[float, ...],
    counts: Tensor | None,
) -> tuple[Tensor, Tensor | None]:
    """Stored scale and zero point of every block: of all factors the one with the least squared error.

    ``counts``: what the errors of each column count, in the shape of a row of blocks; ``None`` is 1.
    """
    best_scale = rule.scale_from(extent, factors[0])
    best_zero = None if minimum is None else rule.zero_from(minimum, best_scale, factors[0])
    if len(factors) == 1:
        return best_scale, best_zero
    best = _block_error(rule, blocks, dims, best_scale, best_zero, counts)
    for factor in factors[1:]:
        scale = rule.scale_from(extent, factor)
        zero = None if minimum is None else rule.zero_from(minimum, scale, factor)
        error = _block_error(rule, blocks, dims, scale, zero, counts)
        better = error < best
        best = torch.where(better, error, best)
        best_scale = torch.where(better, scale, best_scale)
        if best_zero is not None and zero is not None:
            best_zero = torch.where(better, zero, best_zero)
    return best_scale, best_zero


def _block_error(
    rule: Rule, blocks: Tensor, dims: tuple[int, ...], scale: Tensor, zero: Tensor | None, counts: Tensor | None
) -> Tensor:
    """Squared error of every block, summed in float64, which squares of no float32 leave."""
    values = rule.meant(rule.values(blocks, scale, zero))
    residual = rule.residual(blocks, values, scale, zero)
    return _ordered_sum(residual.to(torch.float64).square_(), dims, counts).reshape(scale.shape)


def _ordered_sum(terms: Tensor, dims: tuple[int, ...], counts: Tensor | None) -> Tensor:
    """Sums over blocks in an order of its own: torch's depends on the machine, and near ties choose other scales.

    The rows of a tile from top to bottom, then its columns, each times what it counts, in halves, the middle one of an
    odd number waiting.
    """
    if dims == (1, 3):
        rows = terms.unbind(1)
        terms = rows[0]
        for row in rows[1:]:
            terms = terms + row
        counts = None if counts is None else counts[:, 0]
    if counts is not None:
        terms = terms * counts
    if dims == (0, 1):
        terms = terms.reshape(-1)
    while (count := terms.shape[-1]) > 1:
        half = (count + 1) // 2
        left = terms[..., :half].clone()
        left[..., : count - half] += terms[..., half:]
        terms = left
    return terms


def _chunks(scheme: Scheme, rows: int, cols: int) -> Iterator[tuple[int, int, int, int]]:
    """Row ranges of the matrix, each with the range of the scale's rows that it fills."""
    match scheme.blocking:
        case PerTensor():
            yield 0, rows, 0, 1
            return
        case Channel() | Group():
            tall = 1
        case Block(rows=tall):
            pass
        case _:
            raise FormatError(f"rounding in blocks of {scheme.blocking} is not available")
    step = max(1, CHUNK_ELEMENTS // (cols * tall)) * tall
    for begin in range(0, rows, step):
        end = min(rows, begin + step)
        yield begin, end, begin // tall, -(-end // tall)


def _blocked(w: Tensor, scheme: Scheme) -> tuple[Tensor, tuple[int, ...]]:
    """A float32 view in which every block owns the returned dimensions; edge tiles are filled up with zeros."""
    x = w.to(torch.float32)
    rows, cols = x.shape
    match scheme.blocking:
        case PerTensor():
            return x, (0, 1)
        case Group(size=size):
            if cols % size:
                raise ValueError(f"groups of {size} do not divide {cols} columns")
            return x.view(rows, cols // size, size), (2,)
        case Block(rows=tall, cols=wide):
            if rows % tall or cols % wide:
                x = torch.nn.functional.pad(x, (0, -cols % wide, 0, -rows % tall))
            return x.view(x.shape[0] // tall, tall, x.shape[1] // wide, wide), (1, 3)
    return x, (1,)


def _unblocked(values: Tensor, scheme: Scheme, rows: int, cols: int) -> Tensor:
    """The inverse of ``_blocked``."""
    if isinstance(scheme.blocking, Block):
        tiles, tall, across, wide = values.shape
        return values.reshape(tiles * tall, across * wide)[:rows, :cols]
    return values.reshape(rows, cols)
