"""What engines do to activations before a matrix product whose both sides are rounded."""

from __future__ import annotations

import torch
from torch import Tensor

from qconvert.core.errors import FormatError
from qconvert.core.fp8 import widen_e4m3
from qconvert.core.scheme import Activation, Float, Int

_FP8_MAX = 448.0


def quantize_activations(x: Tensor, activation: Activation) -> Tensor:
    """Round activations as an engine does on the fly, and return the numbers that the product then sees.

    FP8 e4m3 per token: ``scale = max(max|x| / 448, 1 / (448 * 512))``; per group of inputs:
    ``scale = max(max|x|, 1e-10) / 448``; int8 per token: ``scale = max(max|x|, 1e-10) / 127``. Scales are float32,
    codes saturate, halves go to even (vLLM 0.32, dynamic per-token and per-group kernels).

    Args:
        x: [..., K], any float type.
        activation: ``none`` or ``dynamic``.

    Returns:
        [..., K] in the type of ``x``.

    Raises:
        FormatError: a static scale, which no scheme here stores, or another grid.
        ValueError: the group does not divide K.
    """
    if activation.kind == "none":
        return x
    if activation.kind == "static":
        raise FormatError("activations with a stored scale cannot be simulated")
    values = x.to(torch.float32)
    if activation.group is not None:
        if x.shape[-1] % activation.group:
            raise ValueError(f"groups of {activation.group} do not divide {x.shape[-1]} inputs")
        values = values.reshape(*x.shape[:-1], -1, activation.group)
    largest = values.abs().amax(dim=-1, keepdim=True)
    match activation.grid:
        case Float(kind="e4m3fn"):
            if activation.group is None:
                scale = (largest / _FP8_MAX).clamp_(min=1.0 / (_FP8_MAX * 512.0))
            else:
                scale = largest.clamp_(min=1e-10) / _FP8_MAX
            codes = widen_e4m3((values / scale).clamp_(-_FP8_MAX, _FP8_MAX).to(torch.float8_e4m3fn))
        case Int(bits=8):
            scale = largest.clamp_(min=1e-10) / 127.0
            codes = (values / scale).round_().clamp_(-128.0, 127.0)
        case _:
            raise FormatError(f"activations on the grid {activation.grid} cannot be simulated")
    return (codes * scale).reshape(x.shape).to(x.dtype)
