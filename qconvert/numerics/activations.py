"""What engines do to activations before a matrix product whose both sides are rounded."""

from __future__ import annotations

import torch
from torch import Tensor

from qconvert.core.errors import FormatError
from qconvert.core.fp8 import widen_e4m3
from qconvert.core.scheme import Activation, Float, Int
from qconvert.numerics.rounding_rule import round_to_e2m1

_FP8_MAX = 448.0
_FP4_MAX = 6.0


def quantize_activations(x: Tensor, activation: Activation, scale: float | None = None) -> Tensor:
    """Round activations as an engine does on the fly, and return the numbers that the product then sees.

    FP8 e4m3 per token: ``scale = max(max|x| / 448, 1 / (448 * 512))``; per group of inputs:
    ``scale = max(max|x|, 1e-10) / 448``; int8 per token: ``scale = max(max|x|, 1e-10) / 127``. Scales are float32,
    codes saturate, halves go to even (vLLM 0.32, dynamic per-token and per-group kernels). With one scale that is
    stored: ``code = e4m3(x * (1 / scale))`` (vLLM 0.32, static kernel). FP4 e2m1 in groups, with a global scale g that
    is stored: ``s = e4m3(g * (max|x| * (1/6)))``, ``code = e2m1(x * (1 / (s * (1/g))))``, which stands for
    ``code * (s / g)``; a group whose s is zero becomes zeros (vLLM 0.32, ``ref_nvfp4_quant``).

    Args:
        x: [..., K], any float type.
        activation: of any kind.
        scale: what is stored of the inputs, exact in float32: where they are ``static`` the scale, of e2m1 the g.

    Returns:
        [..., K] in the type of ``x``.

    Raises:
        FormatError: a scale that has to be stored is not given, or another grid.
        ValueError: the group does not divide K.
    """
    if activation.kind == "none":
        return x
    values = x.to(torch.float32)
    if activation.group is not None:
        if x.shape[-1] % activation.group:
            raise ValueError(f"groups of {activation.group} do not divide {x.shape[-1]} inputs")
        values = values.reshape(*x.shape[:-1], -1, activation.group)
    match activation:
        case Activation(kind="static", grid=Float(kind="e4m3fn"), group=None):
            rounded = _static_fp8(values, _stored(activation, scale))
        case Activation(kind="dynamic", grid=Float(kind="e4m3fn")):
            rounded = _dynamic_fp8(values, token=activation.group is None)
        case Activation(kind="dynamic", grid=Int(bits=8)):
            rounded = _dynamic_int8(values)
        case Activation(kind="dynamic", grid=Float(kind="e2m1"), group=int()):
            rounded = _fp4_in_groups(values, _stored(activation, scale))
        case _:
            raise FormatError(f"activations that are {str(activation).removeprefix('-a-')} cannot be simulated")
    return rounded.reshape(x.shape).to(x.dtype)


def _stored(activation: Activation, scale: float | None) -> float:
    if scale is None:
        raise FormatError(f"activations that are {str(activation).removeprefix('-a-')} need a stored scale")
    return scale


def _largest(values: Tensor) -> Tensor:
    return values.abs().amax(dim=-1, keepdim=True)


def _e4m3(values: Tensor) -> Tensor:
    """The nearest e4m3 numbers, in float32; in place."""
    return widen_e4m3(values.clamp_(-_FP8_MAX, _FP8_MAX).to(torch.float8_e4m3fn))


def _static_fp8(values: Tensor, scale: float) -> Tensor:
    return _e4m3(values * (1.0 / scale)) * scale


def _dynamic_fp8(values: Tensor, *, token: bool) -> Tensor:
    scale = _largest(values).clamp_(min=0.0 if token else 1e-10) / _FP8_MAX
    if token:
        scale.clamp_(min=1.0 / (_FP8_MAX * 512.0))
    return _e4m3(values / scale) * scale


def _dynamic_int8(values: Tensor) -> Tensor:
    scale = _largest(values).clamp_(min=1e-10) / 127.0
    return (values / scale).round_().clamp_(-128.0, 127.0) * scale


def _fp4_in_groups(values: Tensor, over: float) -> Tensor:
    scale = _e4m3(_largest(values) * (1.0 / _FP4_MAX) * over)
    factor = (scale * (1.0 / over)).where(scale != 0.0, 1.0).reciprocal_()
    return round_to_e2m1((values * factor).clamp_(-_FP4_MAX, _FP4_MAX)) * (scale / over)
