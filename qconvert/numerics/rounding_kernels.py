"""Compiled rounding of one matrix, the same bits as ``rounding_torch`` for codes, scales and zero points.

All loops run along rows without branches, so that the compiler turns them into vector instructions. A number of N rows
and K columns arrives as its bits: uint16 is BF16, uint32 is float32. Rounding to even is an addition: a float32 number
plus 2**23 times the wanted step has no bits left below that step.

Losses are summed in a fixed order: lane ``k % LANES`` of float32 takes the columns k of ``STRIP`` rows from left to
right and from top to bottom; lanes are folded in halves, and strips are added in float64.
"""

from __future__ import annotations

import numpy as np
from numba.extending import overload
from numpy import float32, float64, int16, int32, uint16, uint32

from qconvert.numerics.compilation import inner, kernel

LANES = 512
STRIP = 8

SYMMETRIC, ASYMMETRIC, E4M3, E2M1 = 0, 1, 2, 3

_TO_INTEGER = float32(1.5 * 2**23)
_ONE, _HALF, _ZERO, _INFINITE = float32(1.0), float32(0.5), float32(0.0), float32(np.inf)
_LARGEST_E4M3, _LARGEST_E2M1 = float32(448.0), float32(6.0)


def widened(bits):
    """The float32 number of BF16 or float32 bits."""
    raise NotImplementedError


def positive(bits):
    """Bits as an integer that orders positive numbers among each other and above the negative ones."""
    raise NotImplementedError


def negative(bits):
    """The same for negative numbers."""
    raise NotImplementedError


def magnitude(bits):
    """Bits without the sign."""
    raise NotImplementedError


@overload(widened)
def _widened(bits):
    if bits.bitwidth == 32:
        return lambda bits: uint32(bits).view(float32)
    return lambda bits: uint32(uint32(bits) << uint32(16)).view(float32)


@overload(positive)
def _positive(bits):
    if bits.bitwidth == 32:
        return lambda bits: int32(bits)
    return lambda bits: int16(bits)


@overload(negative)
def _negative(bits):
    if bits.bitwidth == 32:
        return lambda bits: int32(bits ^ uint32(0x80000000))
    return lambda bits: int16(bits ^ uint16(0x8000))


@overload(magnitude)
def _magnitude(bits):
    if bits.bitwidth == 32:
        return lambda bits: uint32(bits & uint32(0x7FFFFFFF))
    return lambda bits: uint16(bits & uint16(0x7FFF))


@inner
def _bits(number):
    return float32(number).view(uint32)


@inner
def _number(bits):
    return uint32(bits).view(float32)


@inner
def _largest(bits):
    """The largest magnitude; infinite or NaN if one number is."""
    most = magnitude(bits[0])
    for k in range(bits.size):
        most = max(most, magnitude(bits[k]))
    return widened(most)


@inner
def _peaks(bits):
    """How far the numbers reach above and below 0; infinite or NaN if one number is."""
    up, down = positive(bits[0]), negative(bits[0])
    for k in range(bits.size):
        up = max(up, positive(bits[k]))
        down = max(down, negative(bits[k]))
    return _reach(up), _reach(down)


@inner
def _reach(ordered):
    return widened(magnitude(ordered)) if ordered > 0 else _ZERO


@inner
def _heighten(bits, tallest):
    """Keep the larger magnitude of every column."""
    for k in range(tallest.size):
        tallest[k] = max(tallest[k], magnitude(bits[k]))


@inner
def _stored_scales(extent, steps, factor, stored, scale):
    """``Rule.scale_from``: scales rounded to the stored type that ``stored`` describes.

    That is its limits, its smallest normal number, what rounds to its subnormals when added, how many bits its
    mantissa has less than float32's, and the scale of a block of zeros.
    """
    low, high, normal, magic = stored[0], stored[1], stored[2], stored[3]
    dropped = uint32(stored[4])
    half = uint32(uint32(uint32(1) << dropped) >> uint32(1))
    below = uint32(half - uint32(half > 0))
    for g in range(scale.size):
        wanted = float32(extent[g] / steps) * factor
        wanted = low if wanted < low else wanted
        wanted = high if wanted > high else wanted
        bits = _bits(wanted)
        odd = uint32(uint32(bits >> dropped) & uint32(half > 0))
        rounded = _number(uint32(uint32(uint32(bits + below) + odd) >> dropped) << dropped)
        subnormal = float32(float32(wanted + magic) - magic)
        rounded = subnormal if wanted < normal else rounded
        scale[g] = stored[5] if extent[g] == _ZERO else rounded


@inner
def _powers_of_two(extent, factor, scale):
    """``Rule.scale_from`` where scales are powers of two and codes e2m1."""
    for g in range(scale.size):
        biased = int32(uint32(_bits(extent[g] * factor) + uint32(1 << 21)) >> uint32(23)) - int32(2)
        biased = min(max(biased, int32(1)), int32(252))
        scale[g] = _ONE if extent[g] == _ZERO else _number(uint32(biased) << uint32(23))


@inner
def _zeros(down, scale, factor, low, high, zero):
    """``Rule.zero_from``: zero points around 0, whole numbers."""
    for g in range(zero.size):
        point = float32(float32(float32(down[g] * factor) / scale[g]) + _TO_INTEGER) - _TO_INTEGER
        point = float32(point + low)
        zero[g] = high if point > high else point


@inner
def _fill(numbers, value):
    for k in range(numbers.size):
        numbers[k] = value


@inner
def _spread(per_block, wide, per_column):
    for g in range(per_block.size):
        _fill(per_column[g * wide : (g + 1) * wide], per_block[g])


@inner
def _clamp(number, low, high):
    number = low if number < low else number
    return high if number > high else number


@inner
def _round_e4m3(number):
    """The magnitude of the nearest e4m3 number, and its code.

    A step is an eighth of the power of two below the number, 2**-9 for the smallest; the code counts steps.
    """
    bits = _bits(number)
    size = _number(bits & uint32(0x7FFFFFFF))
    size = _LARGEST_E4M3 if size > _LARGEST_E4M3 else size
    power = uint32(max(uint32(_bits(size) & uint32(0x7F800000)), uint32(121 << 23)))
    magic = uint32(power + uint32(20 << 23))
    moved = float32(size + _number(magic))
    steps = uint32(_bits(moved) - magic)
    code = uint32(uint32(power >> uint32(20)) - uint32(121 << 3)) + steps
    return float32(moved - _number(magic)), uint32(code | uint32(uint32(bits >> uint32(24)) & uint32(0x80)))


@inner
def _round_e2m1(number):
    """The magnitude of the nearest e2m1 number, and its code: as ``_round_e4m3``, a step is half that power, or 1/2."""
    bits = _bits(number)
    size = _number(bits & uint32(0x7FFFFFFF))
    size = _LARGEST_E2M1 if size > _LARGEST_E2M1 else size
    power = uint32(max(uint32(_bits(size) & uint32(0x7F800000)), uint32(127 << 23)))
    magic = uint32(power + uint32(22 << 23))
    moved = float32(size + _number(magic))
    steps = uint32(_bits(moved) - magic)
    code = uint32(uint32(power >> uint32(22)) - uint32(127 << 1)) + steps
    return float32(moved - _number(magic)), uint32(code | uint32(uint32(bits >> uint32(28)) & uint32(8)))


@inner
def _code_symmetric(bits, scale, low, high, codes, error, signal):
    for k in range(codes.size):
        w = widened(bits[k])
        moved = _clamp(w / scale[k], low, high) + _TO_INTEGER
        codes[k] = _bits(moved)
        off = (moved - _TO_INTEGER) * scale[k] - w
        error[k] += off * off
        signal[k] += w * w


@inner
def _code_asymmetric(bits, scale, zero, low, high, codes, error, signal):
    shift = uint32(-low)
    for k in range(codes.size):
        w = widened(bits[k])
        moved = _clamp(w / scale[k] + zero[k], low, high) + _TO_INTEGER
        codes[k] = _bits(moved) + shift
        off = (moved - _TO_INTEGER - zero[k]) * scale[k] - w
        error[k] += off * off
        signal[k] += w * w


@inner
def _code_e4m3(bits, scale, codes, error, signal):
    for k in range(codes.size):
        w = widened(bits[k])
        size, code = _round_e4m3(w / scale[k])
        codes[k] = code
        off = size * scale[k] - abs(w)
        error[k] += off * off
        signal[k] += w * w


@inner
def _code_e2m1(bits, scale, codes, error, signal):
    for k in range(codes.size):
        w = widened(bits[k])
        size, code = _round_e2m1(w / scale[k])
        codes[k] = code
        off = size * scale[k] - abs(w)
        error[k] += off * off
        signal[k] += w * w


@inner
def _add_errors(grid, bits, scale, zero, low, high, errors):
    """Add the squared error of every column, as ``rounding_torch`` computes it: float32, squared in float64."""
    if grid == SYMMETRIC:
        for k in range(bits.size):
            w = widened(bits[k])
            value = (_clamp(w / scale[k], low, high) + _TO_INTEGER) - _TO_INTEGER
            off = float64(value * scale[k] - w)
            errors[k] += off * off
    elif grid == ASYMMETRIC:
        for k in range(bits.size):
            w = widened(bits[k])
            value = (_clamp(w / scale[k] + zero[k], low, high) + _TO_INTEGER) - _TO_INTEGER
            off = float64((value - zero[k]) * scale[k] - w)
            errors[k] += off * off
    elif grid == E2M1:
        for k in range(bits.size):
            w = widened(bits[k])
            size, _ = _round_e2m1(w / scale[k])
            off = float64(size * scale[k] - abs(w))
            errors[k] += off * off
    else:
        for k in range(bits.size):
            w = widened(bits[k])
            size, _ = _round_e4m3(w / scale[k])
            off = float64(size * scale[k] - abs(w))
            errors[k] += off * off


@inner
def _fold(lanes):
    """The sum of all lanes, in halves, the middle one of an odd number waiting; lanes are used up."""
    count = lanes.size
    while count > 1:
        half = (count + 1) // 2
        left, right = lanes[: count - half], lanes[half:count]
        for k in range(left.size):
            left[k] += right[k]
        count = half
    return float64(lanes[0])


@inner
def _quantize(w, grid, tall, wide, steps, low, high, stored, factors, importance, codes, scales, zeros, sums):
    """Round a matrix; false as soon as a number is NaN or infinite.

    Args:
        w: bits, uint16 or uint32 [N, K].
        grid: ``SYMMETRIC``, ``ASYMMETRIC``, ``E4M3`` or ``E2M1``.
        tall: rows of a block; 1 with zero points.
        wide: columns of a block.
        steps: what a block's extent is divided by, float32.
        low: smallest code as a number around 0, float32.
        high: largest code, float32.
        stored: the type of the scales, float32 [6], see ``_stored_scales``; zeros for powers of two.
        factors: what scales are multiplied by to find the best, float32; one is no search.
        importance: what squared errors of each column count, float64 [K]; empty is 1.
        codes: bytes, uint8 [at least N, K], written.
        scales: float32 [at least ceil(N / tall), ceil(K / wide)], written.
        zeros: with zero points uint8 [at least N, ceil(K / wide)], written.
        sums: squared error and signal, float64 [2], added to.
    """
    rows, cols = w.shape
    across = scales.shape[1]
    extent, down = np.empty(across, float32), np.empty(across, float32)
    zero = np.zeros(across, float32)
    trial, trial_zero = np.empty(across, float32), np.zeros(across, float32)
    least = np.empty(across, float64)
    errors = np.empty(across * wide if factors.size > 1 else 0, float64)
    wide_scale, wide_zero = np.empty(cols, float32), np.zeros(cols, float32)
    tallest = np.empty(cols, w.dtype)
    lanes = min(cols, LANES)
    error, signal = np.zeros(lanes, float32), np.zeros(lanes, float32)
    for first in range(0, rows, tall):
        last = min(rows, first + tall)
        top = w[first]
        if tall > 1:
            _fill(tallest, 0)
            for n in range(first, last):
                _heighten(w[n], tallest)
            top = tallest
        for g in range(across):
            run = top[g * wide : (g + 1) * wide]
            if grid == ASYMMETRIC:
                up, down[g] = _peaks(run)
                extent[g] = up * _HALF + down[g] * _HALF
            else:
                extent[g] = _largest(run)
            if not extent[g] < _INFINITE:
                return False
        scale = scales[first // tall]
        for f in range(factors.size):
            if stored[1] == _ZERO:
                _powers_of_two(extent, factors[f], trial)
            else:
                _stored_scales(extent, steps, factors[f], stored, trial)
            if grid == ASYMMETRIC:
                _zeros(down, trial, factors[f], low, high, trial_zero)
            if factors.size > 1:
                _spread(trial, wide, wide_scale)
                _spread(trial_zero, wide, wide_zero)
                _fill(errors, 0.0)
                for n in range(first, last):
                    _add_errors(grid, w[n], wide_scale, wide_zero, low, high, errors)
                for k in range(importance.size):
                    errors[k] *= importance[k]
            for g in range(across):
                trial_error = _fold(errors[g * wide : (g + 1) * wide]) if factors.size > 1 else 0.0
                if f == 0 or trial_error < least[g]:
                    least[g], scale[g], zero[g] = trial_error, trial[g], trial_zero[g]
        _spread(scale, wide, wide_scale)
        if grid == ASYMMETRIC:
            _spread(zero, wide, wide_zero)
            point = zeros[first]
            for g in range(across):
                point[g] = int32(zero[g] - low)
        for n in range(first, last):
            for begin in range(0, cols, LANES):
                end = begin + LANES
                bits, by, to = w[n][begin:end], wide_scale[begin:end], codes[n][begin:end]
                if grid == SYMMETRIC:
                    _code_symmetric(bits, by, low, high, to, error, signal)
                elif grid == ASYMMETRIC:
                    _code_asymmetric(bits, by, wide_zero[begin:end], low, high, to, error, signal)
                elif grid == E2M1:
                    _code_e2m1(bits, by, to, error, signal)
                else:
                    _code_e4m3(bits, by, to, error, signal)
            if n % STRIP == STRIP - 1 or n == rows - 1:
                sums[0] += _fold(error)
                sums[1] += _fold(signal)
                _fill(error, _ZERO)
                _fill(signal, _ZERO)
    return True


@kernel
def quantize_bf16(w, grid, tall, wide, steps, low, high, stored, factors, importance, codes, scales, zeros, sums):
    """BF16 bits, uint16 [N, K]; see ``_quantize``."""
    return _quantize(w, grid, tall, wide, steps, low, high, stored, factors, importance, codes, scales, zeros, sums)


@kernel
def quantize_f32(w, grid, tall, wide, steps, low, high, stored, factors, importance, codes, scales, zeros, sums):
    """Float32 bits, uint32 [N, K]; see ``_quantize``."""
    return _quantize(w, grid, tall, wide, steps, low, high, stored, factors, importance, codes, scales, zeros, sums)
