"""Blocks that are further from the original than any rounding of them: codes or scales that were destroyed."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from qconvert.core.errors import FormatError
from qconvert.core.quantized import QuantizedTensor
from qconvert.core.role import TensorRole
from qconvert.core.scheme import Block, Blocking, Channel, Flat, Float, Group, Int, PerTensor, Scheme
from qconvert.numerics.rounding import quantize
from qconvert.parity.blocks import BlockSums, block_sums, joined, sums_by_block
from qconvert.parity.causes import Cause, CauseKind, cause
from qconvert.parity.clipping import given_up
from qconvert.parity.faults import NO_SIGNAL, counted, factor_cause, is_factor

DAMAGED_DB = 9.0
"""How far above its bound a squared error must be for damage, in a matrix whose other pieces keep to theirs.

A scale that is wrong by half is 10 dB and more above, for groups whose largest value is up to four times their root
mean square.
"""

SPREAD = 2.0
"""How much more is allowed for each dB that a tenth of the pieces exceed.

Plain rounding exceeds nothing, nor do searches of scales, whose cut-off values do not count. Error feedback (GPTQ,
Frantar et al. 2022, arXiv 2210.17323) moves the error to where inputs do not see it, all over a matrix: of 32,768 and
8,192 simulated groups of 32 and 128, with independent, correlated and low-rank inputs and with clipping, a tenth
exceeded the bound by 1.4 to 9.3 dB and the worst by 2.7 to 19.4 dB, each less than this allows.
"""

BEYOND_ANY_DB = 20.0
"""What no method exceeds: for four bits, an error as large as the numbers themselves."""

FINELY = 3.5
"""Up to how many times an even spread over the steps of its own scale the other values of a block may err for what it
cuts off to be given up. Rounding to nearest never exceeds it: half a step everywhere is 3, and the step is taken from
what a block holds, whose codes may end at 7 of 7.5."""

UPSCALED, DOWNSCALED, STRAIGHT = 1.25, 0.7, 0.95
"""Factors, with the cosine beside them, that name a wrong scale among damage. Clipping shrinks, so small factors need
more; the same simulations reached 1.17 and 0.67, the latter with a smaller cosine."""

RUN = 128
"""Columns of a row that are one piece under the fp8 grid."""

_RELATIVE_E4M3 = 1 / 768
"""Mean of the squared relative error of e4m3 where its steps are widest: half a step is 1/16, and a third of its
square is the mean of an even spread."""

_ENGINE_ROUNDING = 2.0**-16 / 3
"""The same of BF16, in which engines may hold dequantized weights: half a step is 1/256."""

_COARSE_STEP = 1 / 3
"""Widest step of the 4-bit floats and codebooks, of a block's largest value: e2m1 has 2/6, NF4 0.304."""


def pieces(scheme: Scheme) -> Blocking:
    """What is looked at by itself.

    Of integers the block that shares a scale, as a clipped scale gives up one value for all others of its block. Of
    e4m3, whose steps follow each value so that clipping gains nothing, runs of ``RUN`` columns of a row.
    """
    if scheme.grid == Float(kind="e4m3fn") and not isinstance(scheme.blocking, (Group, Flat)):
        return Group(size=RUN)
    return scheme.blocking


@dataclass(frozen=True, slots=True, kw_only=True)
class Evidence:
    """What faults of a quantized matrix, or of a run of its rows, show in.

    Attributes:
        pieces: sums over ``pieces`` of the scheme.
        excess: by how many dB the squared error of each piece exceeds its bound, float64; 0 where there is no error to
            speak of. The bound is the larger of the squared error of plain rounding and of an even spread over the
            steps of the plain scale: ``n s**2 / 12`` for n integers of step s, ``sum(w**2) / 768`` for e4m3. What a
            smaller scale gives up counts as no error, see ``given_up``, where the others are rounded as finely as that
            scale can.
        cut: blocks that give something up so, as a mask in the shape of the scales.
    """

    pieces: BlockSums
    excess: Tensor
    cut: Tensor


def evidence(w: Tensor, v: Tensor, quantized: QuantizedTensor, scheme: Scheme, sums: BlockSums) -> Evidence:
    """Look at rows of a matrix for what no rounding does.

    Args:
        w: [N, K] float32, whole blocks.
        v: what ``quantized`` means for an engine.
        quantized: its codes and scales.
        scheme: of the matrix; codes that are laid together from several may have scales for less than its blocks.
        sums: of ``w`` and ``v``, over blocks of ``scheme``.
    """
    small = _piece_sums(w, v, scheme, sums)
    bound = _even_spread(w, small.signal, scheme)
    seen = Evidence(pieces=small, excess=_above(small, bound), cut=torch.zeros_like(sums.signal, dtype=torch.bool))
    if not bool((seen.excess > DAMAGED_DB).any() or is_factor(sums).any()):
        return seen
    # rarely reached: plain rounding costs time only where it decides
    plain = _plain(w, scheme)
    if plain is None:
        return seen
    bound = bound.maximum(sums_by_block((w - plain).square_(), pieces(scheme)))
    excess = _above(small, bound)
    cut = given_up(w, v, plain, quantized)
    if not bool(cut.any()):
        return replace(seen, excess=excess)
    rest, left = w.masked_fill(cut, 0.0), v.masked_fill(cut, 0.0)
    others = block_sums(rest, left, scheme.blocking)
    fine = _finely(others, v, scheme)
    small = _piece_sums(rest, left, scheme, others)
    excess = torch.where(_finely(small, v, scheme), _above(small, bound), excess)
    return replace(seen, excess=excess, cut=fine & (sums_by_block(cut.to(torch.float32), scheme.blocking) > 0))


def together(runs: Sequence[Evidence]) -> Evidence:
    """The evidence of a matrix from that of its runs of rows, which begin where blocks begin."""
    return Evidence(
        pieces=joined([run.pieces for run in runs]),
        excess=torch.cat([run.excess for run in runs]),
        cut=torch.cat([run.cut for run in runs]),
    )


def damage_faults(
    role: TensorRole,
    name: str,
    seen: Evidence,
    scheme: Scheme,
    shape: tuple[int, ...],
    known: Collection[CauseKind],
) -> Iterator[Cause]:
    """Pieces that no rounding explains, without those that a cause of ``known`` on the same matrix explains."""
    sums, excess = seen.pieces, seen.excess
    above = excess > DAMAGED_DB
    if CauseKind.SCALE_FACTOR in known:
        above &= ~is_factor(sums)
    if CauseKind.LOST in known:
        above &= sums.approximated > 0
    if not bool(above.any()):
        return
    where, count = pieces(scheme), excess.numel()
    usual = float(excess.flatten().kthvalue(max(1, int(0.9 * count))).values)
    allowed = min(BEYOND_ANY_DB, DAMAGED_DB + SPREAD * max(0.0, usual))
    ratio = sums.ratio
    scaled = above & (sums.cosine >= STRAIGHT) & ((ratio >= UPSCALED) | (ratio <= DOWNSCALED))
    if bool(scaled.any()):
        yield factor_cause(role, name, sums, scaled, where, shape)
    broken = above & ~scaled & (excess > allowed)
    if bool(broken.any()):
        worst = excess[broken].max()
        said = (
            f"{float(worst):.1f} dB above" if math.isfinite(worst) else "where the original is zero, infinitely above"
        )
        cosine = sums.cosine[broken].nan_to_num(0.0).median()
        yield cause(
            CauseKind.DAMAGED,
            role,
            f"{counted(broken, where, shape)}: squared error {said} what rounding costs there "
            f"(cosine {float(cosine):.4f})",
            (name,),
        )


def _piece_sums(w: Tensor, v: Tensor, scheme: Scheme, sums: BlockSums) -> BlockSums:
    """Sums over pieces; ``sums`` are those of the scheme's blocks."""
    where = pieces(scheme)
    return sums if where == scheme.blocking else block_sums(w, v, where)


def _above(sums: BlockSums, bound: Tensor) -> Tensor:
    error = sums.squared_error
    return (10 * (error / bound).log10()).where(error > NO_SIGNAL, 0.0)


def _finely(others: BlockSums, v: Tensor, scheme: Scheme) -> Tensor:
    """Where what is not given up is rounded as finely as the scales that ``v`` [N, K] has used up allow."""
    return others.squared_error <= FINELY * _even_spread(v, others.signal, scheme)


def _even_spread(w: Tensor, signal: Tensor, scheme: Scheme) -> Tensor:
    """The squared error of an even spread over the steps of the scale that ``w`` [N, K] needs, and of an engine's."""
    return signal * _ENGINE_ROUNDING + _grid_spread(w, signal, scheme)


def _grid_spread(w: Tensor, signal: Tensor, scheme: Scheme) -> Tensor:
    if scheme.grid == Float(kind="e4m3fn"):
        return signal * _RELATIVE_E4M3
    low, high = _extremes(w, scheme.blocking)
    match scheme.grid:
        case Int(bits=bits) if scheme.symmetric:
            step = low.maximum(high) / (2.0 ** (bits - 1) - 0.5)
        case Int(bits=bits):
            step = (low + high) / (2.0**bits - 1)
        case _:
            step = low.maximum(high) * _COARSE_STEP
    counts = sums_by_block(torch.ones(1, 1).expand_as(w), scheme.blocking)
    return counts * step.square() / 12


def _extremes(w: Tensor, blocking: Blocking) -> tuple[Tensor, Tensor]:
    """How far each block reaches below and above zero, float64, in the shape of the scales."""
    rows = len(w)
    match blocking:
        case PerTensor():
            blocks = w.reshape(1, 1, -1)
        case Channel():
            blocks = w.unsqueeze(1)
        case Group(size=size):
            blocks = _padded(w, 1, size).view(rows, -1, size)
        case Block(rows=tall, cols=wide):
            tiles = _padded(w, tall, wide)
            blocks = tiles.view(-1, tall, tiles.shape[1] // wide, wide).transpose(1, 2).flatten(2)
        case Flat(size=size):
            blocks = _padded(w.reshape(1, -1), 1, size).view(-1, size)
    return blocks.amin(-1).clamp(max=0).neg().to(torch.float64), blocks.amax(-1).clamp(min=0).to(torch.float64)


def _padded(w: Tensor, rows: int, cols: int) -> Tensor:
    return torch.nn.functional.pad(w, (0, -w.shape[1] % cols, 0, -w.shape[0] % rows))


def _plain(w: Tensor, scheme: Scheme) -> Tensor | None:
    """What plain rounding leaves; ``None`` for a scheme that it does not know."""
    try:
        return quantize(w, scheme).quantized.dequantize()
    except (FormatError, ValueError):
        return None
