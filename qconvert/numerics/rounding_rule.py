"""What codes and scales of a scheme are: the formulas, on tensors, that every way of rounding shares."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from qconvert.core.errors import FormatError
from qconvert.core.quantized import QuantizedTensor
from qconvert.core.scheme import Float, Int, Scheme

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
class Rule:
    """How codes and scales of one scheme are computed."""

    scheme: Scheme

    @cached_property
    def steps(self) -> float:
        """What the extent of a block is divided by: half of the range where there are zero points, else ``max|w|``."""
        match self.scheme.grid:
            case Int(bits=bits):
                return 2.0 ** (bits - 1) - 0.5
            case Float(kind="e4m3fn"):
                return 448.0
        raise FormatError(f"rounding to {self.scheme.grid} is not available; use an integer or the fp8 grid")

    @cached_property
    def code_range(self) -> tuple[float, float]:
        """Smallest and largest code as numbers around 0."""
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
        """The element type of codes in a ``QuantizedTensor``."""
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
        """The extent that scales follow from, NaN or infinite if one element is; the minimum where zero points are."""
        if self.scheme.symmetric:
            return blocks.abs().amax(dim=dims, keepdim=True), None
        minimum = blocks.amin(dim=dims, keepdim=True).clamp_(max=0.0)
        # Halved, so that the extent of the widest float32 range stays finite.
        return (blocks.amax(dim=dims, keepdim=True).clamp_(min=0.0) * 0.5).sub_(minimum * 0.5), minimum

    def scale_from(self, extent: Tensor, factor: float) -> Tensor:
        """Scales in the stored type; an all-zero block gets 1."""
        # By a tensor: on a GPU torch multiplies by the reciprocal of a plain number.
        wanted = extent / torch.tensor(self.steps, dtype=torch.float32, device=extent.device)
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


def describe_not_finite(values: Tensor) -> str:
    """How many elements are NaN and infinite, for the message of an error that the caller completes with a name."""
    runs = torch.tensor_split(values, -(-values.shape[0] // 256))  # No copies of the size of a matrix.
    nan, infinite = (sum(int(test(run).sum()) for run in runs) for test in (torch.isnan, torch.isinf))
    return f"{nan} NaN and {infinite} infinite values"
