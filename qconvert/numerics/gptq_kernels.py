"""The compiled column loop of error feedback: the bits of ``gptq.feed_back_with_torch``.

Rows do not meet: each goes through its columns from left to right, and what rounding one of them lost moves the ones
behind it before they are rounded. Only that last step runs along a row, and it is a vector instruction.
"""

from __future__ import annotations

from numpy import float32, uint32

from qconvert.numerics.compilation import inner, kernel

_TO_INTEGER = float32(1.5 * 2**23)


@inner
def _bits(number):
    return float32(number).view(uint32)


@inner
def _number(bits):
    return uint32(bits).view(float32)


@inner
def _nearest(number, low, high, least, magic):
    """The nearest value of a grid, halves to even: whole numbers where ``magic`` is 0, else small floats.

    A float's steps are as wide as its power of two says, at least that of ``least``; adding 2**23 of them, whose
    exponent lies ``magic`` above that power's, leaves no bits below one.
    """
    number = low if number < low else number
    number = high if number > high else number
    if magic == uint32(0):
        return float32(float32(number + _TO_INTEGER) - _TO_INTEGER)
    bits = _bits(number)
    size = _number(bits & uint32(0x7FFFFFFF))
    power = uint32(max(uint32(bits & uint32(0x7F800000)), least))
    coarse = _number(uint32(power + magic))
    size = float32(float32(size + coarse) - coarse)
    return _number(_bits(size) | uint32(bits & uint32(0x80000000)))


@kernel
def feed_back(w, target, unit, scale, zero, group, low, high, least, magic, values, errors, missed):
    """Round a run of C columns of every row.

    Args:
        w: float32 [N, C].
        target: what to round, float32 [N, C]: ``w`` with the errors of the columns before the run; used up.
        unit: these columns' part of the factor, float32 [C, C], upper triangular with ones on its diagonal.
        scale: what codes are multiplied by, float32 [N, G].
        zero: zero points around 0, float32 [N, G].
        group: which scale each column has, int64 [C].
        low: smallest value of the grid, float32.
        high: largest, float32.
        least: bits of the power of two below which a float grid's steps get no finer, uint32.
        magic: see ``_nearest``, uint32.
        values: float32 [N, C], written: the grid's values.
        errors: float32 [N, C], written: ``w`` less what the values mean.
        missed: float32 [N, C], written: the target less what the values mean.
    """
    rows, columns = w.shape
    for n in range(rows):
        row, off = target[n], errors[n]
        for i in range(columns):
            g = group[i]
            by, point = scale[n, g], zero[n, g]
            value = _nearest(float32(float32(row[i] / by) + point), low, high, least, magic)
            meant = float32(float32(value - point) * by)
            values[n, i] = value
            missed[n, i] = row[i] - meant
            error = float32(w[n, i] - meant)
            off[i] = error
            ahead, step = row[i + 1 :], unit[i, i + 1 :]
            for k in range(ahead.size):
                ahead[k] += float32(error * step[k])
