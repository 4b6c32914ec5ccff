"""GPTQ twice in float64, one column at a time: as the paper's algorithm has it, and as what it stands for."""

from __future__ import annotations

import torch
from torch import Tensor

from qconvert.core.quantized import E2M1_VALUES, QuantizedTensor
from qconvert.core.scheme import Float, Int
from tests.numerics.textbook import E4M3


def grid(q: QuantizedTensor) -> Tensor:
    """All values of codes, as they count before zero points are taken off."""
    match q.scheme.grid:
        case Int(bits=bits):
            low = -(2 ** (bits - 1)) if q.scheme.symmetric else 0
            return torch.arange(low, low + 2**bits, dtype=torch.float64)
        case Float(kind="e2m1"):
            positive = E2M1_VALUES[:8]
        case _:
            positive = tuple(E4M3)
    return torch.tensor(sorted({*positive, *(-number for number in positive)}), dtype=torch.float64)


def spread(q: QuantizedTensor) -> tuple[Tensor, Tensor]:
    """Scale and zero point of every element, [N, K]."""
    scale = q.spread(q.scale.double()).expand(q.shape)
    if q.second_scale is not None:
        scale = scale * q.second_scale.double()
    zero = torch.zeros(q.shape) if q.zero_point is None else q.spread(q.zero_point.double()).expand(q.shape)
    return scale, zero.double()


def rounded(target: Tensor, values: Tensor, scale: Tensor, zero: Tensor) -> Tensor:
    """What the nearest codes of targets [N] mean."""
    meant = (values[None] - zero[:, None]) * scale[:, None]
    nearest = (meant - target[:, None]).abs().argmin(1)
    return meant.gather(1, nearest[:, None]).squeeze(1)


def damped(h: Tensor, damping: float) -> Tensor:
    return h.double() + damping * h.double().diagonal().mean() * torch.eye(len(h), dtype=torch.float64)


def by_inverse(w: Tensor, q: QuantizedTensor, h: Tensor, damping: float, order: Tensor) -> Tensor:
    """Frantar et al. 2022, algorithm 1, without blocks: what is left of a row moves by the inverse's factor."""
    values, (scale, zero) = grid(q), spread(q)
    upper = torch.linalg.cholesky(torch.linalg.inv(damped(h, damping)[order][:, order]), upper=True)
    left, out = w.double()[:, order].clone(), torch.empty_like(w, dtype=torch.float64)
    for i, k in enumerate(order.tolist()):
        out[:, k] = rounded(left[:, i], values, scale[:, k], zero[:, k])
        error = (left[:, i] - out[:, k]) / upper[i, i]
        left[:, i:] -= error[:, None] * upper[i, i:]
    return out


def by_solving(w: Tensor, q: QuantizedTensor, h: Tensor, damping: float, order: Tensor) -> Tensor:
    """Before each column is rounded, all that are left are set to the real numbers with the least loss."""
    values, (scale, zero) = grid(q), spread(q)
    full, out = damped(h, damping), w.double().clone()
    for i in range(len(order)):
        done, rest, k = order[:i], order[i:], int(order[i])
        error = out[:, done] - w.double()[:, done]
        moved = -torch.linalg.solve(full[rest][:, rest], full[rest][:, done] @ error.T).T
        out[:, k] = rounded(w.double()[:, k] + moved[:, 0], values, scale[:, k], zero[:, k])
    return out


def loss(w: Tensor, out: Tensor, h: Tensor, damping: float) -> Tensor:
    """``e H e^T`` of every row."""
    error = out.double() - w.double()
    return ((error @ damped(h, damping)) * error).sum(1)
