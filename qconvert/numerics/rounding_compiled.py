"""Rounding of one matrix by compiled kernels: tensors in, tensors out."""

from __future__ import annotations

import math
from collections.abc import Iterator
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from torch import Tensor

from qconvert.core.dtypes import DType
from qconvert.core.errors import DataError
from qconvert.core.quantized import QuantizedTensor
from qconvert.core.scheme import Block, Float, Group, Scheme
from qconvert.numerics import rounding_kernels as kernels
from qconvert.numerics.rounding_rule import SEARCH_FACTORS, Rounded, Rule, describe_not_finite
from qconvert.numerics.rounding_torch import quantize_with_torch

PIECE_ELEMENTS = 1 << 18
"""Elements of a type or layout without a kernel that are widened to float32 at a time."""


def quantize_compiled(
    w: Tensor, scheme: Scheme, *, search: bool = False, importance: Tensor | None = None, second: float = 1.0
) -> Rounded:
    """What ``rounding.quantize`` returns, for a scheme with a kernel and a matrix in a CPU's memory.

    ``importance`` as in ``quantize_with_torch``. BF16 and float32 are read in place. Beside the result, memory goes to
    float32 scales and to rows of scratch.

    Raises:
        DataError: ``w`` holds NaN or infinity.
        ValueError: the group does not divide K.
    """
    rows, cols = w.shape
    rule = Rule(scheme=scheme, second=second)
    setting = _setting(rule, cols, search)
    _, tall, *_ = setting
    counts = np.empty(0, np.float64) if importance is None else importance.to(torch.float32).double().numpy()
    codes = torch.empty(rows, cols, dtype=rule.code_dtype)
    scale = torch.empty(scheme.scale_shape(rows, cols), dtype=torch.float32)
    zero_point = torch.empty((0, 0) if scheme.symmetric else scale.shape, dtype=torch.uint8)
    codes_NK, scale_NG, zero_NG = codes.view(torch.uint8).numpy(), scale.numpy(), zero_point.numpy()
    sums = np.zeros(2, np.float64)
    for begin, kernel, bits in _pieces(w.detach(), tall):
        first = begin // tall
        if not kernel(bits, *setting, counts, codes_NK[begin:], scale_NG[first:], zero_NG[first:], sums):
            raise DataError(describe_not_finite(w))
    squared_error, signal = sums.tolist()
    if not (1e-20 < squared_error < 1e30 and 1e-20 < signal < 1e30):
        # Squares left the range of float32, or there is no error at all.
        return quantize_with_torch(w, scheme, search=search, importance=importance, second=second)
    quantized = QuantizedTensor(
        codes=codes,
        scale=(scale / second).to(scheme.scale.dtype.torch_dtype),
        zero_point=None if scheme.symmetric else zero_point,
        second_scale=rule.second_scale,
        scheme=scheme,
        shape=(rows, cols),
    )
    return Rounded(quantized=quantized, squared_error=squared_error, signal=signal)


@lru_cache(maxsize=64)
def _setting(rule: Rule, cols: int, search: bool) -> tuple[Any, ...]:
    """What the kernels are told about a scheme; see ``rounding_kernels._quantize``."""
    scheme = rule.scheme
    if isinstance(scheme.grid, Float):
        grid = kernels.E4M3 if scheme.grid.kind == "e4m3fn" else kernels.E2M1
    else:
        grid = kernels.SYMMETRIC if scheme.symmetric else kernels.ASYMMETRIC
    low, high = np.array(rule.code_range, np.float32)
    factors = np.array(SEARCH_FACTORS if search else SEARCH_FACTORS[:1], np.float32)
    return grid, *_block_shape(scheme, cols), np.float32(rule.steps), low, high, _stored(rule), factors


def _block_shape(scheme: Scheme, cols: int) -> tuple[int, int]:
    match scheme.blocking:
        case Group(size=size):
            if cols % size:
                raise ValueError(f"groups of {size} do not divide {cols} columns")
            return 1, size
        case Block(rows=tall, cols=wide):
            return tall, wide
    return 1, cols


def _stored(rule: Rule) -> Any:
    """The type of stored scales as ``kernels._stored_scales`` wants it: limits, subnormals, mantissa bits dropped.

    Zeros for powers of two, which need none of it. A second scale, a power of two itself, moves all of the type's
    numbers up or down: the kernel rounds to products of both.
    """
    if rule.scheme.scale.dtype is DType.F8_E8M0:
        return np.zeros(6, np.float32)
    info = torch.finfo(rule.scheme.scale.dtype.torch_dtype)
    eps = rule.coarsest_eps
    # Below this, steps of the type's smallest number are coarser than what another type would need.
    smallest = info.smallest_normal * info.eps / eps * rule.second
    to_subnormal = smallest * eps * 2.0**23
    dropped = 23 + math.log2(eps)
    low, high = (limit * rule.second for limit in rule.scale_limits)
    return np.array([low, high, smallest, to_subnormal, dropped, rule.second], np.float32)


def _pieces(w: Tensor, tall: int) -> Iterator[tuple[int, Any, Any]]:
    """Runs of rows: where each begins, its kernel and the bits of its numbers."""
    rows, cols = w.shape
    in_place = w.is_contiguous() and w.data_ptr() % w.itemsize == 0
    if in_place and w.dtype == torch.bfloat16:
        yield 0, kernels.quantize_bf16, w.view(torch.uint16).numpy()
    elif in_place and w.dtype == torch.float32:
        yield 0, kernels.quantize_f32, w.view(torch.uint32).numpy()
    else:
        # Whole blocks and whole strips, so that sums do not depend on the pieces.
        step = math.lcm(tall, kernels.STRIP)
        step *= max(1, PIECE_ELEMENTS // (cols * step))
        for begin in range(0, rows, step):
            piece = w[begin : begin + step].to(torch.float32, copy=True, memory_format=torch.contiguous_format)
            yield begin, kernels.quantize_f32, piece.view(torch.uint32).numpy()
