"""Whether what an engine gave of a block is what the reference gives.

Shapes: B rows, T tokens, W anything.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor

from qconvert.parity.execution.recorded import Recorded

SMALL = 0.1
"""Of the mean size of a block's outputs: smaller ones are judged by this size, for their own rounding is no fault."""

ROUNDINGS = 4.0
"""So many roundings of the hidden states that a block's output was added to, or taken from."""

T = TypeVar("T")


@dataclass(frozen=True, slots=True, kw_only=True)
class Told:
    """What an engine gave of one block in one run.

    Attributes:
        given: float32 [B, T, W].
        noise: relative rounding of the engine's numbers.
        carrier: what the output is added to [B, T, W]: its size times ``noise`` is no fault.
        undecided: tokens that are not judged, bool [B, T].
        first: token of the run that comes first in ``given``.
    """

    run: Recorded
    given: Tensor
    noise: float
    carrier: Tensor | None = None
    undecided: Tensor | None = None
    first: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Agreement:
    """How one block of all runs compares.

    Attributes:
        worst: the largest relative error of a token.
        differing: runs that differ, each with the row and token that does first, and its relative error.
        agreeing: runs that do not.
    """

    worst: float
    differing: tuple[tuple[Recorded, int, int, float], ...]
    agreeing: tuple[Recorded, ...]

    @property
    def differs(self) -> bool:
        """Whether any does."""
        return bool(self.differing)

    def pattern(self, of_calls: T, of_padding: T, else_: T) -> T:
        """Which of three it is: shown by tokens that come in several calls alone, by padding alone, or otherwise."""
        if not self.agreeing:
            return else_
        if all(len(run.calls) > 1 for run, *_ in self.differing):
            return of_calls
        return of_padding if all(run.padded for run, *_ in self.differing) else else_

    def said(self) -> str:
        """Where it differs, in words."""
        run, row, token, error = self.differing[0]
        agrees = f", but not {' and '.join(one.name for one in self.agreeing)}" if self.agreeing else ""
        call = ""
        if len(run.calls) > 1:
            ends = torch.tensor(run.calls).cumsum(0)
            call = f" (call {int((ends <= token).sum()) + 1} of {len(run.calls)})"
        padding = " (padded)" if not bool(run.real[row].all()) else ""
        place = f"from token {token}{call} of row {row}{padding} on"
        names = " and ".join(one.name for one, *_ in self.differing)
        return f"differs {names}{agrees}, {place}, by {error:.2g} of its size, while its input agrees"


def compare_block(told: Sequence[Told], expected: Sequence[Tensor], limit: float) -> Agreement:
    """Compare each token's outputs; those further off than ``limit`` times their size, and than rounding, differ."""
    worst, differing, agreeing = 0.0, [], []
    for one, right in zip(told, expected, strict=True):
        size = right.norm(dim=-1)
        judged = one.run.real[:, one.first : one.first + size.shape[1]]
        if one.undecided is not None:
            judged = judged & ~one.undecided
        if not bool(judged.any()):
            agreeing.append(one.run)
            continue
        size = size.clamp(min=SMALL * float(size[judged].mean())).clamp(min=1e-30)
        far = (one.given - right).norm(dim=-1)
        rounding = 0.0 if one.carrier is None else ROUNDINGS * one.noise * one.carrier.norm(dim=-1)
        error = torch.where(judged, far / size, 0.0)
        # NaN differs
        wrong = judged & ~(far <= limit * size + rounding)
        worst = max(worst, float(error.nan_to_num(nan=torch.inf).max()))
        if not bool(wrong.any()):
            agreeing.append(one.run)
            continue
        token = int(wrong.any(0).nonzero()[0])
        row = int(wrong[:, token].nonzero()[0])
        differing.append((one.run, row, token + one.first, float(error[row, token])))
    return Agreement(worst=worst, differing=tuple(differing), agreeing=tuple(agreeing))
