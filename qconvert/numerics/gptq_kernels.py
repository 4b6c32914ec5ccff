"""The compiled column loop of error feedback: the bits of ``gptq.loop_with_torch``.

Rows do not meet: each goes through its columns in their order, and what rounding one of them lost moves the ones behind
it before they are rounded. So ``STRIP`` rows go through together, side by side in memory, and every step is a vector
instruction. A strip and its share of the factor stay in the processor's nearest caches.
"""

from __future__ import annotations

import numpy as np
from numpy import float32, uint32

from qconvert.numerics.compilation import inner, kernel

STRIP = 64
"""Rows that are rounded side by side; the last ones of a matrix with fewer share them with numbers of no meaning."""

_TO_INTEGER = float32(1.5 * 2**23)


@inner
def _bits(number):
    return float32(number).view(uint32)


@inner
def _number(bits):
    return uint32(bits).view(float32)


@inner
def _clamp(number, low, high):
    number = low if number < low else number
    return high if number > high else number


@inner
def _round_to_whole(target, by, point, low, high):
    """Replace targets by the nearest whole numbers of a grid, halves to even, around the zero point."""
    for n in range(STRIP):
        number = _clamp(float32(float32(target[n] / by[n]) + point[n]), low, high)
        target[n] = float32(float32(number + _TO_INTEGER) - _TO_INTEGER)


@inner
def _round_to_float(target, by, point, low, high, least, magic):
    """The same for small floats.

    Their steps are as wide as a number's power of two says, at least that of ``least``; adding 2**23 of them, whose
    exponent lies ``magic`` above that power's, leaves no bits below one.
    """
    for n in range(STRIP):
        bits = _bits(_clamp(float32(float32(target[n] / by[n]) + point[n]), low, high))
        size = _number(bits & uint32(0x7FFFFFFF))
        power = uint32(max(uint32(bits & uint32(0x7F800000)), least))
        coarse = _number(uint32(power + magic))
        size = float32(float32(size + coarse) - coarse)
        target[n] = _number(_bits(size) | uint32(bits & uint32(0x80000000)))


@inner
def _weigh(target, value, w, by, point, pivot, error, lost):
    """What a column's values miss of the weights, and add what they miss of their targets to the loss."""
    for n in range(STRIP):
        meant = float32(float32(value[n] - point[n]) * by[n])
        error[n] = float32(w[n] - meant)
        missed = float32(target[n] - meant)
        lost[n] += float32(float32(missed * missed) * pivot)


@inner
def _move(target, error, share):
    for n in range(STRIP):
        target[n] += float32(error[n] * share)


@inner
def _copy(numbers, to):
    for n in range(numbers.size):
        to[n] = numbers[n]


@kernel
def feed_back(w, target, unit, pivots, scale, zero, group, low, high, least, magic, values, errors, losses):
    """Round a run of C columns of every row.

    Args:
        w: float32 [C, N].
        target: what to round, float32 [C, N]: ``w`` with the errors of the columns before the run.
        unit: these columns' part of the factor, float32 [C, C], upper triangular with ones on its diagonal.
        pivots: likewise, float32 [C].
        scale: what codes are multiplied by, float32 [G, N].
        zero: zero points around 0, float32 [G, N].
        group: which scale each column has, int64 [C].
        low: smallest value of the grid, float32.
        high: largest, float32.
        least: bits of the power of two below which a float grid's steps get no finer, uint32.
        magic: see ``_round_to_float``, uint32; 0 where the grid is whole numbers.
        values: float32 [C, N], written: the grid's values.
        errors: float32 [C, N], written: ``w`` less what the values mean.
        losses: float32 [N], written: ``sum over columns of pivot * (target - meant)**2``, in their order.
    """
    columns, rows = w.shape
    moved = np.zeros((columns, STRIP), float32)
    aim, weight, error = np.zeros(STRIP, float32), np.zeros(STRIP, float32), np.zeros(STRIP, float32)
    by, point, lost = np.ones(STRIP, float32), np.zeros(STRIP, float32), np.zeros(STRIP, float32)
    for begin in range(0, rows, STRIP):
        end = min(rows, begin + STRIP)
        for k in range(columns):
            _copy(target[k, begin:end], moved[k])
        for n in range(STRIP):
            lost[n] = float32(0.0)
        for k in range(columns):
            value = moved[k]
            _copy(value, aim)
            _copy(w[k, begin:end], weight)
            _copy(scale[group[k], begin:end], by)
            _copy(zero[group[k], begin:end], point)
            if magic == uint32(0):
                _round_to_whole(value, by, point, low, high)
            else:
                _round_to_float(value, by, point, low, high, least, magic)
            _weigh(aim, value, weight, by, point, pivots[k], error, lost)
            _copy(value[: end - begin], values[k, begin:end])
            _copy(error[: end - begin], errors[k, begin:end])
            for j in range(k + 1, columns):
                _move(moved[j], error, unit[k, j])
        _copy(lost[: end - begin], losses[begin:end])
