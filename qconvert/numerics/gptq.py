"""Rounding with error feedback: what a column loses, the columns behind it make up for. N rows, K columns, G groups."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from qconvert.core.errors import FormatError
from qconvert.core.quantized import QuantizedTensor
from qconvert.core.scheme import Block, Float, Grid, Group, Int, PerTensor, Scheme
from qconvert.numerics.hessian import Factor
from qconvert.numerics.importance import quantize_by_importance
from qconvert.numerics.rounding import quantize
from qconvert.numerics.rounding_bitsandbytes import is_bitsandbytes
from qconvert.numerics.rounding_rule import Rule
from qconvert.numerics.threads import one_thread

COLUMNS = 128
"""Columns that are rounded one after another, before the ones behind them learn of it in one product."""

_FLOAT_STEPS: dict[Grid, tuple[int, int]] = {
    Float(kind="e4m3fn"): (121 << 23, 20 << 23),
    Float(kind="e2m1"): (127 << 23, 22 << 23),
}
"""See ``gptq_kernels``: bits of 2**-6 with steps of an eighth, and of 1 with steps of a half."""


Scales = Literal["largest", "searched", "weighted"]
"""How scales are chosen: from the largest value; with the least squared error; with the least weighted one."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Compensated:
    """A rounded matrix and what rounding cost, weighted by the damped Hessian.

    Attributes:
        nearest_loss: sum over rows of ``e H e^T`` of rounding to nearest with the same scales.
        loss: the same of ``quantized``; no larger.
        rows_left: rows that are rounded to nearest, because feedback was no better.
    """

    quantized: QuantizedTensor
    nearest_loss: float
    loss: float
    rows_left: int


def gptq(w: Tensor, scheme: Scheme, factor: Factor, *, scales: Scales = "weighted", second: float = 1.0) -> Compensated:
    """Round a matrix so that outputs rather than weights are kept.

    Scales are chosen first. Columns are then taken in the factor's order, and column i is rounded to the nearest code
    of ``w[i] + sum over j before i of (w[j] - rounded[j]) * unit[j, i]``, the best it can do for
    ``e H e^T = sum over i of pivots[i] * (target[i] - rounded[i])**2`` given the columns before it. These are the codes
    of GPTQ (Frantar et al. 2022, arXiv 2210.17323) in the form of Chee et al. 2023 (arXiv 2307.13304, theorem 6).
    Groups stay consecutive: activation order of the ``static`` kind leaves nothing behind that a reader must know.

    Weighted scales have the least sum of ``factor.importance * error**2`` in each block. What feedback is greedy about
    it may lose: rows that share scales are rounded to nearest when that loses no more, so nothing is ever worse than
    rounding to nearest with the same scales.

    Computed in float32, losses summed in float64, on one thread: the same bits for any number of threads.

    Args:
        w: [N, K], any float type; the result is on its device.
        scheme: integers with or without zero points, fp8, mxfp4 or nvfp4, in any blocks that ``quantize`` rounds.
        factor: of the inputs' Hessian, on the same device.
        scales: see ``Scales``.
        second: of a scheme with a second scale, what ``second_scale_for`` gives for all matrices that share it.

    Raises:
        DataError: ``w`` holds NaN or infinity.
        FormatError: a grid or blocking that is not available.
        ValueError: the group does not divide K, or the factor has another number of inputs.
    """
    _check(scheme)
    if scales == "weighted":
        nearest = quantize_by_importance(w, scheme, factor.importance, second=second).quantized
    else:
        nearest = quantize(w, scheme, search=scales == "searched", second=second).quantized
    with one_thread():
        before = row_losses(nearest.dequantize() - w.to(torch.float32), factor)
        fed_back, after = with_feedback(w, nearest, factor)
    shared = _rows_per_scale(scheme, len(before))
    better = (_sums(after, shared) < _sums(before, shared)).repeat_interleave(shared)[: len(before)]
    codes = torch.where(better[:, None], fed_back.codes.view(torch.uint8), nearest.codes.view(torch.uint8))
    return Compensated(
        quantized=replace(nearest, codes=codes.view(nearest.codes.dtype)),
        nearest_loss=float(before.sum()),
        loss=float(torch.where(better, after, before).sum()),
        rows_left=len(before) - int(better.sum()),
    )


def with_feedback(w: Tensor, start: QuantizedTensor, factor: Factor) -> tuple[QuantizedTensor, Tensor]:
    """Codes chosen anew on the scales of ``start``, as ``gptq`` says, and the loss of every row, float64 [N].

    Args:
        w: [N, K], any float type.
        start: what ``quantize`` made of ``w``.
        factor: of the inputs' Hessian.

    Raises:
        FormatError: a grid that is not available, or groups of columns that are not consecutive.
        ValueError: shapes that do not belong together.
    """
    cols = factor.order.shape[0]
    if start.shape != tuple(w.shape) or w.shape[1] != cols:
        raise ValueError(f"a matrix of shape {tuple(w.shape)}, codes of {start.shape} and a Hessian of {cols} inputs")
    if start.column_group is not None:
        raise FormatError("error feedback is not available where groups of columns are not consecutive")
    _check(start.scheme)
    rule = Rule(scheme=start.scheme)
    values, losses = _feed_back(_in_order(w, factor), start, rule, factor)
    codes = rule.codes(values.index_select(0, factor.order.argsort()).T.contiguous())
    return replace(start, codes=codes), losses


def row_losses(error: Tensor, factor: Factor) -> Tensor:
    """``e (H + damping I) e^T`` of every row of ``error`` [N, K], float64 [N]: products in float32, on one thread."""
    ordered = _in_order(error, factor)
    total = torch.zeros(len(error), dtype=torch.float64, device=error.device)
    step = 2 * COLUMNS
    with one_thread():
        for begin in range(0, len(ordered), step):
            end = begin + step
            # The lower half of unit, all zeros, is left out.
            missed = factor.unit[:end, begin:end].T @ ordered[:end]
            total += (factor.pivots[begin:end] @ missed.square_()).to(torch.float64)
    return total


def _in_order(w: Tensor, factor: Factor) -> Tensor:
    """``w`` [N, K] with the factor's order of columns, float32 [K, N]: what is done to a column is done to a run."""
    return w.to(torch.float32).T.contiguous().index_select(0, factor.order)


def _check(scheme: Scheme) -> None:
    if not isinstance(scheme.grid, Int | Float) or is_bitsandbytes(scheme):
        raise FormatError(f"error feedback to {scheme} is not available: use an integer, the fp8 or the fp4 grid")


def _feed_back(w: Tensor, nearest: QuantizedTensor, rule: Rule, factor: Factor) -> tuple[Tensor, Tensor]:
    """Values of the grid [K, N] of ``w`` [K, N], both in the factor's order, and the loss of every row, float64 [N]."""
    cols, rows = w.shape
    scale, zero, group = _scales(nearest, rule)
    group = group[factor.order]
    loop = loop_compiled if w.device.type == "cpu" else loop_with_torch
    values, errors = torch.empty_like(w), torch.empty_like(w)
    total = torch.zeros(rows, dtype=torch.float64, device=w.device)
    for begin in range(0, cols, COLUMNS):
        here = slice(begin, min(cols, begin + COLUMNS))
        run = Columns(
            w=w[here],
            target=torch.addmm(w[here], factor.unit[:begin, here].T, errors[:begin]),
            unit=factor.unit[here, here].contiguous(),
            pivots=factor.pivots[here],
            scale=scale,
            zero=zero,
            group=group[here].contiguous(),
        )
        values[here], errors[here], losses = loop(run, rule)
        total += losses.to(torch.float64)
    return values, total


def _scales(nearest: QuantizedTensor, rule: Rule) -> tuple[Tensor, Tensor, Tensor]:
    """What multiplies codes and where zero is, float32 [G, N], and which of them each column has, int64 [K]."""
    rows, cols = nearest.shape
    scale = nearest.scale.to(torch.float32)
    if nearest.second_scale is not None:
        scale = scale * nearest.second_scale
    zero = torch.zeros_like(scale)
    if nearest.zero_point is not None:
        zero = nearest.zero_point.to(torch.float32) - rule.shift
    wide = cols
    match nearest.scheme.blocking:
        case Group(size=size):
            wide = size
        case Block(rows=tall, cols=wide):
            scale, zero = (part.repeat_interleave(tall, dim=0)[:rows] for part in (scale, zero))
    group = torch.arange(cols, device=scale.device).div_(wide, rounding_mode="floor")
    return scale.expand(rows, -1).T.contiguous(), zero.expand(rows, -1).T.contiguous(), group


@dataclass(frozen=True, slots=True, kw_only=True)
class Columns:
    """A run of C columns in the factor's order.

    Attributes:
        w: float32 [C, N].
        target: ``w`` moved by what the columns before the run lost, float32 [C, N].
        unit: this run's part of the factor, float32 [C, C].
        pivots: likewise, float32 [C].
        scale: what codes are multiplied by, float32 [G, N].
        zero: zero points around 0, float32 [G, N].
        group: which scale each column has, int64 [C].
    """

    w: Tensor
    target: Tensor
    unit: Tensor
    pivots: Tensor
    scale: Tensor
    zero: Tensor
    group: Tensor


def loop_with_torch(run: Columns, rule: Rule) -> tuple[Tensor, Tensor, Tensor]:
    """Round column by column: values of the grid and ``w`` less what they mean, each [C, N], and losses [N], float32.

    For every device, and the oracle of the compiled loop.
    """
    values, errors, aims = torch.empty_like(run.w), torch.empty_like(run.w), run.target.clone()
    losses = torch.zeros_like(run.w[0])
    for i, g in enumerate(run.group.tolist()):
        by, point, target = run.scale[g], run.zero[g], aims[i]
        value = rule.meant(rule.values(target, by, point))
        meant = (value - point) * by
        values[i], errors[i] = value, run.w[i] - meant
        losses += (target - meant).square_() * run.pivots[i]
        aims[i + 1 :] += errors[i] * run.unit[i, i + 1 :, None]
    return values, errors, losses


def loop_compiled(run: Columns, rule: Rule) -> tuple[Tensor, Tensor, Tensor]:
    """What ``loop_with_torch`` returns, bit for bit, for tensors in a CPU's memory."""
    # Here, because importing numba takes a quarter of a second.
    from qconvert.numerics.gptq_kernels import feed_back

    values, errors, losses = torch.empty_like(run.w), torch.empty_like(run.w), torch.empty_like(run.w[0])
    parts = (run.w, run.target, run.unit, run.pivots, run.scale, run.zero, run.group)
    low, high = np.array(rule.code_range, np.float32)
    least, magic = _FLOAT_STEPS.get(rule.scheme.grid, (0, 0))
    arguments = (low, high, np.uint32(least), np.uint32(magic))
    feed_back(*(part.numpy() for part in parts), *arguments, *(part.numpy() for part in (values, errors, losses)))
    return values, errors, losses


def _rows_per_scale(scheme: Scheme, rows: int) -> int:
    """How many rows share scales, and are left as they are together."""
    match scheme.blocking:
        case PerTensor():
            return rows
        case Block(rows=tall):
            return tall
    return 1


def _sums(losses: Tensor, shared: int) -> Tensor:
    """Losses of runs of ``shared`` rows, the last one shorter; NaN in one is NaN in the sum, and not less than any."""
    return torch.nn.functional.pad(losses, (0, -len(losses) % shared)).view(-1, shared).sum(1)
