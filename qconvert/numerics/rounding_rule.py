"""What codes and scales of a scheme are: the formulas, on tensors, that every way of rounding shares."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from qconvert.core.dtypes import DType
from qconvert.core.errors import FormatError
from qconvert.core.fp8 import widen_e4m3
from qconvert.core.quantized import QuantizedTensor
from qconvert.core.scheme import Float, Int, Scheme

SEARCH_FACTORS: tuple[float, ...] = (1.0, 1.06, *(1.0 - step / 32 for step in range(1, 15)))
"""What the searched rounding multiplies the unsearched scale by; the first wins ties."""

_LARGEST_BF16 = (2.0 - 2.0**-7) * 2.0**127
_SMALLEST_NORMAL = 2.0**-126
_LARGEST_E4M3, _LARGEST_E2M1 = 448.0, 6.0
_E2M1_EXPONENT = 2
"""Of the power of two below its largest number."""
_WIDEST_SECOND = 100
"""Of the power of two of a second scale, so that no product with it leaves the normal numbers of float32."""
_LARGEST_E8M0 = 127 + 125
"""The scale that keeps six times itself finite, biased."""


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
    """How codes and scales of one scheme are computed.

    Attributes:
        second: what multiplies every scale: a power of two, 1 in a scheme without a second scale.
    """

    scheme: Scheme
    second: float = 1.0

    @cached_property
    def second_scale(self) -> Tensor | None:
        """``second`` as a ``QuantizedTensor`` holds it; ``None`` in a scheme without one."""
        return None if self.scheme.scale.second is None else torch.tensor(self.second, dtype=torch.float32)

    @cached_property
    def steps(self) -> float:
        """What the extent of a block is divided by: half of the range where there are zero points, else ``max|w|``."""
        match self.scheme.grid:
            case Int(bits=bits):
                return 2.0 ** (bits - 1) - 0.5
            case Float(kind="e4m3fn"):
                return _LARGEST_E4M3
            case Float(kind="e2m1"):
                return _LARGEST_E2M1
        raise FormatError(f"rounding to {self.scheme.grid} is not available; use an integer, the fp8 or the fp4 grid")

    @cached_property
    def code_range(self) -> tuple[float, float]:
        """Smallest and largest code as numbers around 0."""
        match self.scheme.grid:
            case Int(bits=bits):
                return -(2.0 ** (bits - 1)), 2.0 ** (bits - 1) - 1
        return -self.steps, self.steps

    @cached_property
    def shift(self) -> float:
        """What stored codes and zero points are above the ones computed with, which lie around 0."""
        return 0.0 if self.scheme.symmetric else -self.code_range[0]

    @cached_property
    def code_dtype(self) -> torch.dtype:
        """The element type of codes in a ``QuantizedTensor``."""
        return self.scheme.code_dtype.torch_dtype

    @cached_property
    def scale_limits(self) -> tuple[float, float]:
        """No smaller than the type and float32 can hold, no larger than keeps ``code * scale`` finite."""
        info = torch.finfo(self.scheme.scale.dtype.torch_dtype)
        low, high = self.code_range
        # A code is at most twice as far from its zero point as from 0.
        widest = max(-low, high) * (1 if self.scheme.symmetric else 2)
        power = 1 << (int(widest) - 1).bit_length()
        largest = info.max
        if self.scheme.scale.exact_in is not None:
            largest = (2.0 - self.coarsest_eps) * 2.0 ** math.floor(math.log2(info.max))
        return max(info.smallest_normal * info.eps, _SMALLEST_NORMAL), min(largest, _LARGEST_BF16 / power)

    @property
    def coarsest_eps(self) -> float:
        """The step above 1 of the type of stored scales, or of the other type in which they shall be exact."""
        types = (self.scheme.scale.dtype, self.scheme.scale.exact_in)
        return max(torch.finfo(dtype.torch_dtype).eps for dtype in types if dtype is not None)

    def range_of(self, blocks: Tensor, dims: tuple[int, ...]) -> tuple[Tensor, Tensor | None]:
        """The extent that scales follow from, NaN or infinite if one element is; the minimum where zero points are."""
        if self.scheme.symmetric:
            return blocks.abs().amax(dim=dims, keepdim=True), None
        minimum = blocks.amin(dim=dims, keepdim=True).clamp_(max=0.0)
        # Halved, so that the extent of the widest float32 range stays finite.
        return (blocks.amax(dim=dims, keepdim=True).clamp_(min=0.0) * 0.5).sub_(minimum * 0.5), minimum

    def scale_from(self, extent: Tensor, factor: float) -> Tensor:
        """Scales in the stored type; an all-zero block gets 1."""
        if self.scheme.scale.dtype is DType.F8_E8M0:
            return self._powers_of_two(extent * factor)
        # By a tensor: on a GPU torch multiplies by the reciprocal of a plain number.
        wanted = extent / torch.tensor(self.steps * self.second, dtype=torch.float32, device=extent.device)
        if factor != 1.0:
            wanted = wanted * factor
        wanted.clamp_(*self.scale_limits)
        stored, other = self.scheme.scale.dtype.torch_dtype, self.scheme.scale.exact_in
        if other is not None:
            info = torch.finfo(stored)
            normal = info.smallest_normal * info.eps / self.coarsest_eps
            wanted = torch.where(wanted < normal, wanted, wanted.to(other.torch_dtype).to(torch.float32))
        return wanted.masked_fill_(extent == 0, 1.0).to(stored)

    def whole(self, scale: Tensor) -> Tensor:
        """What a code is multiplied by, in float32: the scale as it is stored, and the second one."""
        return scale.to(torch.float32) if self.second == 1.0 else scale.to(torch.float32) * self.second

    def zero_from(self, minimum: Tensor, scale: Tensor, factor: float) -> Tensor:
        """Zero points in float32, around 0."""
        zero = (minimum * -factor).div_(self.whole(scale)).round_().sub_(self.shift)
        return zero.clamp_(*self.code_range)

    def values(self, blocks: Tensor, scale: Tensor, zero: Tensor | None) -> Tensor:
        """Codes as float32 numbers around 0, before they are narrowed."""
        scaled = blocks / self.whole(scale)
        if zero is not None:
            scaled.add_(zero)
        scaled.clamp_(*self.code_range)
        match self.scheme.grid:
            case Float(kind="e4m3fn"):
                return scaled  # narrowing rounds it
            case Float():
                return round_to_e2m1(scaled)
        return scaled.round_()

    def codes(self, values: Tensor) -> Tensor:
        """What is stored for ``values``."""
        if self.scheme.grid == Float(kind="e2m1"):
            return _codes_of_e2m1(values)
        return (values + self.shift if self.shift else values).to(self.code_dtype)

    def meant(self, values: Tensor) -> Tensor:
        """The numbers that the codes of ``values`` stand for, around 0."""
        return widen_e4m3(values.to(self.code_dtype)) if self.code_dtype == torch.float8_e4m3fn else values

    def residual(self, blocks: Tensor, values: Tensor, scale: Tensor, zero: Tensor | None) -> Tensor:
        """``(value - zero) * scale - w`` in float32, in place of ``values``."""
        if zero is not None:
            values.sub_(zero)
        return values.mul_(self.whole(scale)).sub_(blocks)

    def _powers_of_two(self, largest: Tensor) -> Tensor:
        """The power of two below ``largest``, over that below the grid's largest number.

        What would be cut off by more than rounding moves up one power: a largest number of at least 1.75 in binary
        scientific notation, which is 7 on a grid that ends at 6 (OCP MX 1.0, 6.3, and compressed-tensors 0.20).
        """
        biased = (largest.to(torch.float32).view(torch.int32) + (1 << 21)) >> 23
        codes = (biased - _E2M1_EXPONENT).clamp_(1, _LARGEST_E8M0).masked_fill_(largest == 0, 127)
        return codes.to(torch.uint8).view(torch.float8_e8m0fnu)


def second_scale_for(scheme: Scheme, largest: float) -> float:
    """The power of two that multiplies the scales of a matrix, or of several together; 1 in a scheme without one.

    The smallest with which ``largest``, over the grid's largest number, is no more than the scales' largest. NVIDIA's
    own tools take ``largest / (6 * 448)`` itself and store the reciprocal. A power of two costs no bit of the scales,
    which have some to spare at the low end, and is exact whichever of the two a format stores.

    Args:
        scheme: gives the largest numbers of grid and scales.
        largest: the largest absolute value of all matrices that share it.
    """
    if not scheme.shares_second_scale:
        return 1.0
    most = Rule(scheme=scheme).steps * torch.finfo(scheme.scale.dtype.torch_dtype).max
    tiny = 2.0 ** (2 * -_WIDEST_SECOND)  # whose quotient is still a number
    exponent = math.ceil(math.log2(max(largest, tiny) / most)) if largest > 0.0 else 0
    return 2.0 ** min(max(exponent, -_WIDEST_SECOND), _WIDEST_SECOND)


def round_to_e2m1(scaled: Tensor) -> Tensor:
    """The nearest of 0, 0.5, 1, 1.5, 2, 3, 4, 6 and their negatives, halves to the even mantissa, in place."""
    size = scaled.abs()
    step = torch.where(size < 2.0, 0.5, torch.where(size < 4.0, 1.0, 2.0))
    return scaled.div_(step).round_().mul_(step)


def _codes_of_e2m1(values: Tensor) -> Tensor:
    size = values.abs()
    index = torch.where(size <= 2.0, size * 2.0, torch.where(size <= 4.0, size + 2.0, 7.0))
    return index.to(torch.uint8).bitwise_or_(torch.signbit(values).to(torch.uint8) << 3)


def describe_not_finite(values: Tensor) -> str:
    """How many elements are NaN and infinite, for the message of an error that the caller completes with a name."""
    runs = torch.tensor_split(values, -(-values.shape[0] // 256))  # No copies of the size of a matrix.
    nan, infinite = (sum(int(test(run).sum()) for run in runs) for test in (torch.isnan, torch.isinf))
    return f"{nan} NaN and {infinite} infinite values"
