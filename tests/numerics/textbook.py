"""Rounding one number at a time, in exact fractions but for float32 quotients: slow, and obviously right."""

from __future__ import annotations

import math
from fractions import Fraction

import torch
from torch import Tensor

from qconvert.core.dtypes import DType
from qconvert.core.scheme import Block, Channel, Float, Group, Int, PerTensor, Scheme

E4M3 = sorted(
    (1 + m / 8) * 2.0 ** (e - 7) if e else m / 8 * 2.0**-6 for e in range(16) for m in range(8) if (e, m) != (15, 7)
)
"""All non-negative e4m3 numbers; even positions have an even mantissa."""

E2M1 = [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0]
"""All non-negative e2m1 numbers, likewise."""


def blocks(scheme: Scheme, rows: int, cols: int) -> dict[tuple[int, int], list[tuple[int, int]]]:
    """Position of each scale in [scale rows, scale columns] and the elements that share it."""
    shared: dict[tuple[int, int], list[tuple[int, int]]] = {}
    for n in range(rows):
        for k in range(cols):
            match scheme.blocking:
                case PerTensor():
                    at = (0, 0)
                case Channel():
                    at = (n, 0)
                case Group(size=size):
                    at = (n, k // size)
                case Block(rows=tall, cols=wide):
                    at = (n // tall, k // wide)
                case _:
                    raise NotImplementedError
            shared.setdefault(at, []).append((n, k))
    return shared


def stored(value: float, scheme: Scheme) -> float:
    """A scale rounded to float32 and then to its type, but not to zero.

    F16 scales that are exact in BF16 have its seven bits behind the point, as long as those are multiples of 2**-24.
    """
    kind = scheme.scale.dtype.torch_dtype
    smallest = torch.finfo(kind).smallest_normal * torch.finfo(kind).eps
    number = torch.tensor(value, dtype=torch.float32)
    if scheme.scale.exact_in is not None and value >= 2.0**-17:
        number = number.to(torch.bfloat16)
    return max(number.to(kind).item(), smallest)


def single(value: Fraction) -> Fraction:
    """A number rounded to float32."""
    return Fraction(torch.tensor(float(value), dtype=torch.float32).item())


def nearest_integer(value: Fraction) -> int:
    return round(value)  # Fractions round halves to even.


def nearest(numbers: list[float], value: Fraction) -> float:
    magnitude = min(abs(value), Fraction(numbers[-1]))
    above = next(i for i, number in enumerate(numbers) if Fraction(number) >= magnitude)
    candidates = [i for i in (above - 1, above) if i >= 0]
    best = min(candidates, key=lambda i: (abs(Fraction(numbers[i]) - magnitude), i % 2))
    return math.copysign(numbers[best], value)


def power_of_two(largest: Fraction) -> float:
    """An MX scale for e2m1: a quarter of the power of two below ``largest``, of the next from 7/4 of it on."""
    exponent = math.floor(math.log2(largest))
    if largest >= Fraction(7, 4) * Fraction(2) ** exponent:
        exponent += 1
    return 2.0 ** (exponent - 2)


def quantize(w: Tensor, scheme: Scheme) -> tuple[Tensor, Tensor, Tensor]:
    """Codes as numbers, scales and zero points of a matrix without float32 extremes."""
    rows, cols = w.shape
    shape = scheme.scale_shape(rows, cols)
    codes, scale, zero = torch.zeros(rows, cols), torch.ones(shape), torch.zeros(shape)
    for at, elements in blocks(scheme, rows, cols).items():
        numbers = [Fraction(w[n, k].item()) for n, k in elements]
        low, high = min(0, *numbers), max(0, *numbers)
        if low == high:
            continue
        largest = max(-low, high)
        match scheme.grid:
            case Float(kind="e2m1") if scheme.scale.dtype is DType.F8_E8M0:
                scale[at] = power_of_two(largest)
            case Float(kind="e2m1"):
                scale[at] = stored(float(largest / 6), scheme)
            case Float(kind="e4m3fn"):
                scale[at] = stored(float(largest / 448), scheme)
            case Int(bits=bits) if scheme.symmetric:
                scale[at] = stored(float(largest / (Fraction(2 ** (bits - 1)) - Fraction(1, 2))), scheme)
            case Int(bits=bits):
                scale[at] = stored(float((high - low) / (2**bits - 1)), scheme)
            case _:
                raise NotImplementedError
        exact = Fraction(scale[at].item())
        for (n, k), number in zip(elements, numbers, strict=True):
            match scheme.grid:
                case Int(bits=bits) if scheme.symmetric:
                    code = nearest_integer(single(number / exact))
                    codes[n, k] = min(max(code, -(2 ** (bits - 1))), 2 ** (bits - 1) - 1)
                case Int(bits=bits):
                    zero[at] = min(nearest_integer(single(-low / exact)), 2**bits - 1)
                    half = 2 ** (bits - 1)
                    code = half + nearest_integer(single(single(number / exact) + int(zero[at].item()) - half))
                    codes[n, k] = min(max(code, 0), 2**bits - 1)
                case Float(kind="e2m1"):
                    codes[n, k] = nearest(E2M1, single(number / exact))
                case _:
                    codes[n, k] = nearest(E4M3, single(number / exact))
    return codes, scale, zero
