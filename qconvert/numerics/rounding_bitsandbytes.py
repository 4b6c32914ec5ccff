"""Rounding as bitsandbytes does it: to its codebooks by its own functions, and to the integers of LLM.int8."""

from __future__ import annotations

import torch
from torch import Tensor

from qconvert.core.errors import DataError, UsageError
from qconvert.core.quantized import CODEBOOKS, QuantizedTensor
from qconvert.core.scheme import Codebook, Flat, Int, Scheme
from qconvert.numerics.finite import all_finite
from qconvert.numerics.packing import unpack_pairs
from qconvert.numerics.rounding_rule import Rounded, describe_not_finite
from qconvert.numerics.rounding_torch import sum_of_squares

LARGEST_INT8 = 127
"""LLM.int8 leaves -128 out (Dettmers et al. 2022, arXiv 2208.07339)."""


def is_bitsandbytes(scheme: Scheme) -> bool:
    """Whether this module rounds to the scheme: codebooks, and integers with a second scale, which is 1/127."""
    return isinstance(scheme.grid, Codebook) or (isinstance(scheme.grid, Int) and scheme.scale.second is not None)


def quantize_bitsandbytes(w: Tensor, scheme: Scheme) -> Rounded:
    """What ``rounding.quantize`` returns, for a scheme of bitsandbytes.

    Codebooks: ``scale = max|w|`` of a block, the code of the nearest value, by ``functional.quantize_4bit``.
    LLM.int8: ``scale = max|w|`` of a row, ``code = round(127 * w / scale)``, meaning ``code * scale / 127``, in
    float32, where bitsandbytes itself casts the weights to F16 first. A block of zeros has scale 1.

    Raises:
        DataError: ``w`` holds NaN or infinity.
        UsageError: bitsandbytes is not installed.
        ValueError: the block does not divide the matrix.
    """
    if not all_finite(w):
        raise DataError(describe_not_finite(w))
    rounded = _to_codebook(w, scheme) if isinstance(scheme.grid, Codebook) else _to_integers(w, scheme)
    residual = rounded.dequantize() - w.to(torch.float32)
    return Rounded(
        quantized=rounded, squared_error=sum_of_squares(residual), signal=sum_of_squares(w.to(torch.float32))
    )


def _to_codebook(w: Tensor, scheme: Scheme) -> QuantizedTensor:
    rows, cols = w.shape
    if not isinstance(scheme.grid, Codebook) or not isinstance(scheme.blocking, Flat):
        raise ValueError(f"{scheme} is no codebook over flat blocks")
    size = scheme.blocking.size
    if w.numel() % size:
        raise ValueError(f"blocks of {size} do not divide a {rows} x {cols} matrix")
    try:
        from bitsandbytes import functional  # only where somebody asks for it: it takes seconds to import
    except ImportError:
        raise UsageError(
            f"rounding to {scheme.grid} needs bitsandbytes: pip install 'qconvert[bitsandbytes]'"
        ) from None
    packed, state = functional.quantize_4bit(
        w.contiguous(), blocksize=size, quant_type=scheme.grid.kind, compress_statistics=False
    )
    high_first = packed.reshape(rows, -1)
    pairs = unpack_pairs(high_first).view(rows, -1, 2).flip(2).reshape(-1, size)
    scale = state.absmax.to(torch.float32)
    empty = scale == 0
    pairs[empty] = CODEBOOKS[scheme.grid.kind].index(0.0)
    return QuantizedTensor(
        codes=pairs.view(rows, cols), scale=scale.masked_fill(empty, 1.0), scheme=scheme, shape=(rows, cols)
    )


def _to_integers(w: Tensor, scheme: Scheme) -> QuantizedTensor:
    x = w.to(torch.float32)
    largest = x.abs().amax(dim=1, keepdim=True)
    scale = largest.masked_fill(largest == 0, 1.0)
    return QuantizedTensor(
        codes=(x / scale * LARGEST_INT8).round_().to(torch.int8),
        scale=scale,
        second_scale=torch.tensor(1.0 / LARGEST_INT8, dtype=torch.float32),
        scheme=scheme,
        shape=(w.shape[0], w.shape[1]),
    )
