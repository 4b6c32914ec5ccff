"""Compiled search for numbers that are not finite.

A float is finite as long as its exponent is not all ones, so without their signs the bits of finite numbers are below
those of infinity; the largest of a run says whether all are.
"""

from __future__ import annotations

from numpy import uint16, uint32, uint64

from qconvert.numerics.compilation import kernel

RUN = 1 << 14
"""Numbers that are looked at before the answer can be no."""


@kernel
def all_below_16(bits, infinity):
    """Whether all of uint16 [n] are below ``infinity``, signs aside."""
    for begin in range(0, bits.size, RUN):
        run, most = bits[begin : begin + RUN], uint16(0)
        for k in range(run.size):
            most = max(most, uint16(run[k] & uint16(0x7FFF)))
        if most >= infinity:
            return False
    return True


@kernel
def all_below_32(bits, infinity):
    """Whether all of uint32 [n] are below ``infinity``, signs aside."""
    for begin in range(0, bits.size, RUN):
        run, most = bits[begin : begin + RUN], uint32(0)
        for k in range(run.size):
            most = max(most, uint32(run[k] & uint32(0x7FFFFFFF)))
        if most >= infinity:
            return False
    return True


@kernel
def all_below_64(bits, infinity):
    """Whether all of uint64 [n] are below ``infinity``, signs aside."""
    for begin in range(0, bits.size, RUN):
        run, most = bits[begin : begin + RUN], uint64(0)
        for k in range(run.size):
            most = max(most, uint64(run[k] & uint64(0x7FFFFFFFFFFFFFFF)))
        if most >= infinity:
            return False
    return True
