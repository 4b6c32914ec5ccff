"""Rounding of one matrix to a scheme, with the error that it makes.

Shapes: N rows, K columns, G blocks that share a scale.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from qconvert.core.errors import DataError, FormatError
from qconvert.core.fp8 import widen_e4m3
from qconvert.core.quantized import QuantizedTensor
from qconvert.core.scheme import Block, Channel, Float, Group, Int, PerTensor, Scheme

CHUNK_ELEMENTS = 1 << 18
"""Elements rounded at a time: the float32 working set stays in a core's L2 cache."""

SEARCH_FACTORS: tuple[float, ...] = (1.0, 1.06, *(1.0 - step / 32 for step in range(1, 15)))
"""What the searched rounding multiplies the unsearched scale by; the first wins ties."""

_LARGEST_BF16 = (2.0 - 2.0**-7) * 2.0**127
_SMALLEST_NORMAL = 2.0**-126


@dataclass(frozen=True, slots=True, kw_only=True)
class Rounded:
    """A rounded matrix and what the rounding cost.

    Attributes:
        squared_error: sum over elements of ``(dequantized - w)**2``, against the stored scale.
        signal: sum over elements of ``w**2``.
    """

    quantized: QuantizedTensor
    squared_error: float
    signal: float


@dataclass(frozen=True, kw_only=True)
class _Rule:
    """How codes and scales of one scheme are computed; ``steps`` is what the range of a block is divided by."""

    scheme: Scheme

    @cached_property
    def steps(self) -> float:
        match self.scheme.grid:
            case Int(bits=bits):
                return 2.0 ** (bits - 1) - 0.5 if self.scheme.symmetric else 2.0**bits - 1
            case Float(kind="e4m3fn"):
                return 448.0
        raise FormatError(f"rounding to {self.scheme.grid} is not available; use an integer or the fp8 grid")

    @cached_property
    def code_range(self) -> tuple[float, float]:
        match self.scheme.grid:
            case Int(bits=bits):
                return -(2.0 ** (bits - 1)), 2.0 ** (bits - 1) - 1
        return -448.0, 448.0

    @cached_property
    def shift(self) -> float:
        """What stored codes and zero points are above the ones computed with, which lie around 0."""
        return 0.0 if self.scheme.symmetric else -self.code_range[0]

    @cached_property
    def code_dtype(self) -> torch.dtype:
        if isinstance(self.scheme.grid, Float):
            return torch.float8_e4m3fn
        return torch.int8 if self.scheme.symmetric else torch.uint8

    @cached_property
    def scale_limits(self) -> tuple[float, float]:
        """No smaller than the type and float32 can hold, no larger than keeps ``code * scale`` finite."""
        info = torch.finfo(self.scheme.scale.dtype.torch_dtype)
        low, high = self.code_range
        # A code is at most twice as far from its zero point as from 0.
        widest = max(-low, high) * (1 if self.scheme.symmetric else 2)
        power = 1 << (int(widest) - 1).bit_length()
        return max(info.smallest_normal * info.eps, _SMALLEST_NORMAL), min(info.max, _LARGEST_BF16 / power)

    def range_of(self, blocks: Tensor, dims: tuple[int, ...]) -> tuple[Tensor, Tensor | None]:
        """The extent that scales follow from, and the minimum where there are zero points.

        Raises:
            DataError: a NaN or an infinity; both survive the reductions.
        """
        if self.scheme.symmetric:
            extent, minimum = blocks.abs().amax(dim=dims, keepdim=True), None
        else:
            minimum = blocks.amin(dim=dims, keepdim=True).clamp_(max=0.0)
            # Halved, so that the extent of the widest float32 range stays finite.
            extent = (blocks.amax(dim=dims, keepdim=True).clamp_(min=0.0) * 0.5).sub_(minimum * 0.5)
        if not bool(torch.isfinite(extent).all()):
            raise DataError(describe_not_finite(blocks))
        return extent, minimum

    def scale_from(self, extent: Tensor, factor: float) -> Tensor:
        """Scales in the stored type; an all-zero block gets 1."""
        steps = self.steps if self.scheme.symmetric else self.steps / 2
        wanted = extent / steps
        if factor != 1.0:
            wanted = wanted * factor
        scale = wanted.clamp_(*self.scale_limits).to(self.scheme.scale.dtype.torch_dtype)
        return scale.masked_fill_(extent == 0, 1.0)

    def zero_from(self, minimum: Tensor, scale: Tensor, factor: float) -> Tensor:
        """Zero points in float32, around 0."""
        zero = (minimum * -factor).div_(scale.to(torch.float32)).round_().sub_(self.shift)
        return zero.clamp_(*self.code_range)

    def values(self, blocks: Tensor, scale: Tensor, zero: Tensor | None) -> Tensor:
        """Codes as float32 numbers around 0, before they are narrowed."""
        scaled = blocks / scale.to(torch.float32)
        if zero is not None:
            scaled.add_(zero)
        scaled.clamp_(*self.code_range)
        return scaled if isinstance(self.scheme.grid, Float) else scaled.round_()

    def residual(self, blocks: Tensor, values: Tensor, scale: Tensor, zero: Tensor | None) -> Tensor:
        """``(value - zero) * scale - w`` in float32, in place of ``values``."""
        if zero is not None:
            values.sub_(zero)
        return values.mul_(scale.to(torch.float32)).sub_(blocks)


def quantize(w: Tensor, scheme: Scheme, *, search: bool = False) -> Rounded:
    """Round a matrix to the nearest codes of its stored scales.

    Symmetric integers of b bits: ``scale = max|w| / (2**(b-1) - 1/2)``, ``code = clamp(round(w / scale))``.
    With zero points: ``scale = (max(w, 0) - min(w, 0)) / (2**b - 1)``, ``zero = round(-min(w, 0) / scale)``,
    ``code = clamp(round(w / scale + zero))``; the sum is taken with both counted from the middle of the codes, as
    compressed-tensors does. FP8 e4m3 (OCP 8-bit floating point specification 1.0): ``scale = max|w| / 448``,
    ``code = e4m3(clamp(w / scale, -448, 448))``. Halves go to even. All is computed in float32, after the scale has
    been rounded to its stored type, so codes fit the scale that a reader sees. Scales are never zero, infinite or
    NaN; an all-zero block has scale 1. Rows do not influence each other except inside a ``Block`` and in
    ``PerTensor``.

    Args:
        w: [N, K], any float type.
        scheme: integers or e4m3 with ``Channel``, ``Group``, ``Block`` or ``PerTensor``.
        search: take, block by block, the scale of ``SEARCH_FACTORS`` with the least squared error.

    Raises:
        DataError: ``w`` holds NaN or infinity.
        FormatError: a grid or blocking that is not available.
        ValueError: the group does not divide K.
    """
    rows, cols = w.shape
    rule = _Rule(scheme=scheme)
    codes = torch.empty(rows, cols, dtype=rule.code_dtype)
    scale = torch.empty(scheme.scale_shape(rows, cols), dtype=scheme.scale.dtype.torch_dtype)
    zero_point = None if scheme.symmetric else torch.empty(scale.shape, dtype=torch.uint8)
    squared_error = signal = 0.0
    for begin, end, first, last in _chunks(scheme, rows, cols):
        blocks, dims = _blocked(w[begin:end], scheme)
        extent, minimum = rule.range_of(blocks, dims)
        block_scale, zero = _choose(rule, blocks, dims, extent, minimum, SEARCH_FACTORS if search else (1.0,))
        values = rule.values(blocks, block_scale, zero)
        codes[begin:end] = _unblocked(values + rule.shift if rule.shift else values, scheme, end - begin, cols)
        if isinstance(scheme.grid, Float):
            values = _blocked(widen_e4m3(codes[begin:end]), scheme)[0]
        squared_error += sum_of_squares(rule.residual(blocks, values, block_scale, zero))
        signal += sum_of_squares(blocks)
        scale[first:last] = block_scale.reshape(last - first, -1)
        if zero_point is not None and zero is not None:
            zero_point[first:last] = (zero + rule.shift).reshape(last - first, -1)
    quantized = QuantizedTensor(codes=codes, scale=scale, zero_point=zero_point, scheme=scheme, shape=(rows, cols))
    return Rounded(quantized=quantized, squared_error=squared_error, signal=signal)


def sum_of_squares(values: Tensor) -> float:
    """Sum of squares; float32 inside rows and float64 across, or float64 where float32 would leave its range."""
    flat = values.reshape(values.shape[0], -1)
    total = float(torch.linalg.vector_norm(flat, dim=1).to(torch.float64).square_().sum())
    if 1e-20 < total < 1e30 or (total == 0.0 and not bool(flat.any())):
        return total
    return float(flat.to(torch.float64).square().sum())


def describe_not_finite(values: Tensor) -> str:
    """How many elements are NaN and infinite, for the message of an error that the caller completes with a name."""
    return f"{int(values.isnan().sum())} NaN and {int(values.isinf().sum())} infinite values"


def _choose(
    rule: _Rule,
    blocks: Tensor,
    dims: tuple[int, ...],
    extent: Tensor,
    minimum: Tensor | None,
    factors: tuple[float, ...],
) -> tuple[Tensor, Tensor | None]:
    """Stored scale and zero point of every block: of all factors the one with the least squared error."""
    best_scale = rule.scale_from(extent, factors[0])
    best_zero = None if minimum is None else rule.zero_from(minimum, best_scale, factors[0])
    if len(factors) == 1:
        return best_scale, best_zero
    best = _block_error(rule, blocks, dims, best_scale, best_zero)
    for factor in factors[1:]:
        scale = rule.scale_from(extent, factor)
        zero = None if minimum is None else rule.zero_from(minimum, scale, factor)
        error = _block_error(rule, blocks, dims, scale, zero)
        better = error < best
        best = torch.where(better, error, best)
        best_scale = torch.where(better, scale, best_scale)
        if best_zero is not None and zero is not None:
            best_zero = torch.where(better, zero, best_zero)
    return best_scale, best_zero


def _block_error(rule: _Rule, blocks: Tensor, dims: tuple[int, ...], scale: Tensor, zero: Tensor | None) -> Tensor:
    """Squared error of every block, summed in float64, which squares of no float32 leave."""
    values = rule.values(blocks, scale, zero)
    if isinstance(rule.scheme.grid, Float):
        values = widen_e4m3(values.to(rule.code_dtype))
    residual = rule.residual(blocks, values, scale, zero)
    return residual.to(torch.float64).square_().sum(dim=dims, keepdim=True)


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
