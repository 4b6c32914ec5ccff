"""What the inputs of a matrix are like one by one: means and the largest, without how they go together. K inputs."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from qconvert.core.errors import DataError


@dataclass(frozen=True, slots=True, kw_only=True)
class InputSums:
    """Inputs seen so far; unlike ``Moments`` it takes as much memory for many tokens as for one.

    Attributes:
        tokens: T.
        sum_abs: sum of ``|x|`` over tokens [K], float64, so that the last of many tokens counts like the first.
        sum_squares: sum of ``x**2`` over tokens [K], float64.
        largest: the largest ``|x|`` [K], float32.
    """

    tokens: int
    sum_abs: Tensor
    sum_squares: Tensor
    largest: Tensor

    @classmethod
    def none(cls, inputs: int) -> InputSums:
        """The record of no token, to add to."""
        zeros = torch.zeros(inputs, dtype=torch.float64)
        return cls(tokens=0, sum_abs=zeros, sum_squares=zeros, largest=torch.zeros(inputs))

    def add(self, x: Tensor) -> InputSums:
        """These inputs and ``x`` [..., K], float32. The same batches in the same order give the same bits.

        Raises:
            DataError: NaN, infinity, or numbers whose squares leave float32.
            ValueError: ``x`` does not have K inputs.
        """
        if x.shape[-1:] != self.largest.shape:
            raise ValueError(f"inputs of shape {tuple(x.shape)} for a matrix with {self.largest.numel()} columns")
        rows = x.reshape(-1, x.shape[-1])
        if not len(rows):
            return self
        size = rows.abs()
        squares = size.square().sum(0, dtype=torch.float64)
        if not bool(torch.isfinite(squares).all()):
            raise DataError("inputs hold NaN, infinity, or numbers whose squares are too large to be summed")
        return InputSums(
            tokens=self.tokens + len(rows),
            sum_abs=self.sum_abs + size.sum(0, dtype=torch.float64),
            sum_squares=self.sum_squares + squares,
            largest=torch.maximum(self.largest, size.amax(0)),
        )

    def joined(self, later: InputSums) -> InputSums:
        """These inputs and those of ``later``."""
        return InputSums(
            tokens=self.tokens + later.tokens,
            sum_abs=self.sum_abs + later.sum_abs,
            sum_squares=self.sum_squares + later.sum_squares,
            largest=torch.maximum(self.largest, later.largest),
        )

    @property
    def mean_abs(self) -> Tensor:
        """Mean of ``|x|`` per input [K], float32; zeros without a token."""
        return (self.sum_abs / max(self.tokens, 1)).to(torch.float32)

    @property
    def mean_squares(self) -> Tensor:
        """Mean of ``x**2`` per input [K], float32; zeros without a token."""
        return (self.sum_squares / max(self.tokens, 1)).to(torch.float32)


def co_visits(experts: Tensor, count: int) -> Tensor:
    """How many tokens went to both of two experts; to one of them on the diagonal: int64 [E, E].

    Args:
        experts: int64 [T, k], the experts of each token, all different.
        count: E.
    """
    visited = torch.zeros(len(experts), count).scatter_(1, experts, 1.0)
    # sums of fewer than 2**24 ones are exact
    return (visited.T @ visited).to(torch.int64)
