"""Rounding as bitsandbytes does it: to its codebooks by its own functions, and to the integers of LLM.int8."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from qconvert.core.errors import DataError, UsageError
from qconvert.core.quantized import CODEBOOKS, QuantizedTensor
from qconvert.core.scheme import LLM_INT8, Channel, Codebook, Flat, Scheme, bnb4
from qconvert.numerics.finite import all_finite
from qconvert.numerics.packing import unpack_pairs
from qconvert.numerics.rounding_rule import Rounded, describe_not_finite
from qconvert.numerics.rounding_torch import sum_of_squares

PIECE_ELEMENTS = 1 << 18
"""Elements rounded at a time, or as many rows as hold whole blocks."""

_SCHEMES = (bnb4("nf4"), bnb4("fp4"), LLM_INT8)

LARGEST_INT8 = 127
"""LLM.int8 leaves -128 out (Dettmers et al. 2022, arXiv 2208.07339)."""


def is_bitsandbytes(scheme: Scheme) -> bool:
    """Whether this module rounds to the scheme."""
    return scheme in _SCHEMES


def quantize_bitsandbytes(w: Tensor, scheme: Scheme) -> Rounded:
    """What ``rounding.quantize`` returns, for a scheme of bitsandbytes.

    Codebooks: ``scale = max|w|`` of a block, the code of the nearest value, by ``functional.quantize_4bit``.
    LLM.int8: ``scale = max|w|`` of a row, ``code = round(127 * w / scale)``, meaning ``code * scale / 127``, in
    float32, where bitsandbytes itself casts the weights to F16 first. A block of zeros has scale 1.

    Raises:
        DataError: ``w`` holds NaN or infinity.
        UsageError: bitsandbytes is not installed.
        ValueError: blocks do not divide the matrix.
    """
    if not all_finite(w):
        raise DataError(describe_not_finite(w))
    rows, cols = w.shape
    tall = 1 if isinstance(scheme.blocking, Channel) else _rows_of_whole_blocks(scheme, cols)
    if rows % tall:
        raise ValueError(f"the blocks of {scheme} do not divide a {rows} x {cols} matrix")
    pieces = []
    squared_error = signal = 0.0
    step = tall * max(1, PIECE_ELEMENTS // (cols * tall))
    for begin in range(0, rows, step):  # its functions take up to thirty bytes an element
        x = w[begin : begin + step].to(torch.float32)
        piece = _to_codebook(x, scheme) if isinstance(scheme.grid, Codebook) else _to_integers(x, scheme)
        squared_error += sum_of_squares(piece.dequantize().sub_(x))
        signal += sum_of_squares(x)
        pieces.append(piece)
    quantized = QuantizedTensor(
        codes=torch.cat([piece.codes for piece in pieces]),
        scale=torch.cat([piece.scale for piece in pieces]),
        second_scale=pieces[0].second_scale,
        scheme=scheme,
        shape=(rows, cols),
    )
    return Rounded(quantized=quantized, squared_error=squared_error, signal=signal)


def _rows_of_whole_blocks(scheme: Scheme, cols: int) -> int:
    if not isinstance(scheme.blocking, Flat):
        raise ValueError(f"{scheme} is no codebook over flat blocks")
    return scheme.blocking.size // math.gcd(scheme.blocking.size, cols)


def _to_codebook(x: Tensor, scheme: Scheme) -> QuantizedTensor:
    rows, cols = x.shape
    if not isinstance(scheme.grid, Codebook) or not isinstance(scheme.blocking, Flat):
        raise ValueError(f"{scheme} is no codebook over flat blocks")
    size = scheme.blocking.size
    try:
        from bitsandbytes import functional  # only where somebody asks for it: it takes seconds to import
    except ImportError:
        raise UsageError(
            f"rounding to {scheme.grid} needs bitsandbytes: pip install 'qconvert[bitsandbytes]'"
        ) from None
    packed, state = functional.quantize_4bit(
        x.contiguous(), blocksize=size, quant_type=scheme.grid.kind, compress_statistics=False
    )
    # the first of two codes is in the high half of a byte
    pairs = unpack_pairs(packed.reshape(1, -1)).view(-1, 2).flip(1).reshape(-1, size)
    scale = state.absmax.to(torch.float32)
    empty = scale == 0
    pairs[empty] = CODEBOOKS[scheme.grid.kind].index(0.0)
    return QuantizedTensor(
        codes=pairs.view(rows, cols), scale=scale.masked_fill(empty, 1.0), scheme=scheme, shape=(rows, cols)
    )


def _to_integers(x: Tensor, scheme: Scheme) -> QuantizedTensor:
    largest = x.abs().amax(dim=1, keepdim=True)
    scale = largest.masked_fill(largest == 0, 1.0)
    return QuantizedTensor(
        codes=(x / scale * LARGEST_INT8).round_().to(torch.int8),
        scale=scale,
        second_scale=torch.tensor(1.0 / LARGEST_INT8, dtype=torch.float32),
        scheme=scheme,
        shape=(x.shape[0], x.shape[1]),
    )
