"""The two RMS norms: one whose weight is an offset from 1, and the gated one behind DeltaNet."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional


def widen(x: Tensor) -> Tensor:
    """Promote to at least fp32: bf16 and fp16 become fp32, fp32 and fp64 stay.

    Every place that would lose too much in 16 bits goes through here, so that a model in fp64 is fp64 throughout.
    """
    return x.to(torch.promote_types(x.dtype, torch.float32))


def rms_normalize(x: Tensor, eps: float) -> Tensor:
    """Divide the last dimension by its root mean square.

    ``x / sqrt(mean(x ** 2) + eps)``, any shape, in the dtype of ``x`` (Zhang and Sennrich 2019, arXiv 1910.07467).
    """
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps)


class RMSNorm(nn.Module):
    """RMS norm whose weight is stored as an offset from 1.

    ``(1 + weight) * x / sqrt(mean(x ** 2) + eps)``; x [..., D], weight [D]; computed in at least fp32 and cast to
    the dtype of x at the end. Layer norms, q/k norms and the final norm are of this kind.
    """

    def __init__(self, width: int, eps: float) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.zeros(width))

    def forward(self, x: Tensor) -> Tensor:
        """Normalise [..., D]."""
        return (rms_normalize(widen(x), self.eps) * (1.0 + widen(self.weight))).to(x.dtype)


class GatedRMSNorm(nn.Module):
    """RMS norm with a plain weight, then a SiLU gate.

    ``weight * x / sqrt(mean(x ** 2) + eps) * silu(gate)``; x and gate [..., V], weight [V]. The normalised value is
    cast to the dtype of x before it meets the weight; the gate is applied in at least fp32.
    """

    def __init__(self, width: int, eps: float) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor, gate: Tensor) -> Tensor:
        """Normalise x and gate it, both [..., V]."""
        normal = self.weight * rms_normalize(widen(x), self.eps).to(x.dtype)
        return (normal * functional.silu(widen(gate))).to(x.dtype)
