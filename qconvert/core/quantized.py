"""A quantized matrix, whoever wrote it and however it was packed."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from qconvert.core.fp8 import widen_e4m3
from qconvert.core.scheme import Block, Channel, Codebook, Flat, Float, Group, Int, PerTensor, Scheme

E2M1_VALUES: tuple[float, ...] = (
    0.0,
    0.5,
    1.0,
    1.5,
    2.0,
    3.0,
    4.0,
    6.0,
    -0.0,
    -0.5,
    -1.0,
    -1.5,
    -2.0,
    -3.0,
    -4.0,
    -6.0,
)
"""OCP Microscaling Formats (MX) v1.0, FP4 e2m1 by code."""

NF4_VALUES: tuple[float, ...] = (
    -1.0,
    -0.6961928009986877,
    -0.5250730514526367,
    -0.39491748809814453,
    -0.28444138169288635,
    -0.18477343022823334,
    -0.09105003625154495,
    0.0,
    0.07958029955625534,
    0.16093020141124725,
    0.24611230194568634,
    0.33791524171829224,
    0.44070982933044434,
    0.5626170039176941,
    0.7229568362236023,
    1.0,
)
"""NormalFloat4 by code (Dettmers et al. 2023, arXiv 2305.14314, appendix E)."""

FP4_VALUES: tuple[float, ...] = tuple(
    sign * value / 12.0 for sign in (1.0, -1.0) for value in (0.0, 0.0625, 8.0, 12.0, 4.0, 6.0, 2.0, 3.0)
)
"""bitsandbytes' FP4 by code: sign, then 0, 0.0625, 8, 12, 4, 6, 2, 3, all over 12."""


CODEBOOKS = {"nf4": NF4_VALUES, "fp4": FP4_VALUES}
"""By the name that a ``Codebook`` has."""


@dataclass(frozen=True, slots=True, kw_only=True)
class QuantizedTensor:
    """Codes and scales of one [N, K] matrix.

    Attributes:
        codes: [N, K], unpacked. ``Int`` symmetric: int8; ``Int`` with zero points: uint8; ``e4m3fn``:
            float8_e4m3fn; four-bit floats and codebooks: uint8 indices 0..15.
        scale: of ``scheme.scale_shape(N, K)`` in the element type that is stored.
        zero_point: like ``scale``, uint8 codes; only for ``Int`` with ``symmetric=False``.
        second_scale: one float32 that multiplies every scale; only where ``scheme.scale.second`` says so.
        column_group: [K] int32, the group of every input where groups are not consecutive (GPTQ's ``g_idx``).
        shape: (N, K).
    """

    codes: Tensor
    scale: Tensor
    scheme: Scheme
    shape: tuple[int, int]
    zero_point: Tensor | None = None
    second_scale: Tensor | None = None
    column_group: Tensor | None = None

    def dequantize(self) -> Tensor:
        """The float32 matrix that the codes mean: ``(code - zero_point) * scale * second_scale``, [N, K].

        The scale is widened to float32 before it multiplies; a codebook's or float's code stands for its value.
        """
        values = self._values()
        if self.zero_point is not None:
            values = values - self.spread(self.zero_point.to(torch.float32))
        scale = self.scale.to(torch.float32)
        if self.second_scale is not None:
            scale = scale * self.second_scale.to(torch.float32)
        return values.mul_(self.spread(scale))

    def _values(self) -> Tensor:
        match self.scheme.grid:
            case Int():
                return self.codes.to(torch.float32)
            case Float(kind="e4m3fn"):
                return widen_e4m3(self.codes)
            case Float():
                table = E2M1_VALUES
            case Codebook(kind=kind):
                table = CODEBOOKS[kind]
        return torch.tensor(table, dtype=torch.float32, device=self.codes.device)[self.codes.to(torch.int64)]

    def spread(self, per_block: Tensor) -> Tensor:
        """Repeat one value per block to [N, K], or to something that broadcasts to it."""
        rows, cols = self.shape
        match self.scheme.blocking:
            case PerTensor() | Channel():
                return per_block
            case Group(size=size):
                if self.column_group is not None:
                    return per_block[:, self.column_group.to(torch.int64)]
                return per_block.repeat_interleave(size, dim=1)[:, :cols]
            case Block(rows=block_rows, cols=block_cols):
                tall = per_block.repeat_interleave(block_rows, dim=0)[:rows]
                return tall.repeat_interleave(block_cols, dim=1)[:, :cols]
            case Flat(size=size):
                return per_block.repeat_interleave(size)[: rows * cols].reshape(rows, cols)
