"""Experts whose up and down are scaled against each other, as AWQ does: rows of up over what columns of down are times.

The product of both is what it was, so neither holds a fault by that, and errors are those of what they mean together.

Shapes: F units, D hidden.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor

from qconvert.core.errors import FormatError
from qconvert.core.role import Kind, TensorRole
from qconvert.weights.source import CheckpointWeights

_PARTNERS: Mapping[Kind, Kind] = {
    Kind.EXPERT_UP: Kind.EXPERT_DOWN,
    Kind.EXPERT_DOWN: Kind.EXPERT_UP,
    Kind.SHARED_UP: Kind.SHARED_DOWN,
    Kind.SHARED_DOWN: Kind.SHARED_UP,
}
_UPS = (Kind.EXPERT_UP, Kind.SHARED_UP)

SCALED = 0.1
"""Smallest ``|log2 s|`` of any unit that rounding alone does not give, on average of the units of an expert."""

RECIPROCAL = 0.25
"""Largest ``|log2|`` of the product of what a row of up and a column of down were multiplied by.

Four-bit rounding moves either by less than a tenth, and more only where one value outweighs the rest; a scale of the
wrong size moves one of them by 1 and the other not at all.
"""

_AGREEING = 0.9
"""Share of units whose products have to be near one before a pair is believed to be scaled."""

_NOTHING = 1e-30


class ScaledPairs:
    """Finds out for each expert, and undoes it.

    Attributes:
        found: how many experts are scaled so.
    """

    found: int

    def __init__(self, original: CheckpointWeights, converted: CheckpointWeights) -> None:
        self._original, self._converted = original, converted
        self._known: dict[TensorRole, Tensor | None] = {}
        self.found = 0

    def undone(self, role: TensorRole, values: Tensor, begin: int | None) -> Tensor:
        """Rows ``begin`` and on of a converted matrix as they would be without it; the same tensor where it is not."""
        if role.kind not in _PARTNERS:
            return values
        up = role if role.kind in _UPS else replace(role, kind=_PARTNERS[role.kind])
        if up not in self._known:
            if any((known.section, known.layer) != (up.section, up.layer) for known in self._known):
                self._known.clear()  # layers come one after the other
            self._known[up] = self._factors(up)
            self.found += self._known[up] is not None
        factors = self._known[up]
        if factors is None:
            return values
        if role.kind in _UPS:
            first = begin or 0
            return values * factors[first : first + len(values), None]
        return values / factors

    def _factors(self, up: TensorRole) -> Tensor | None:
        """S [F] with up stored as ``diag(1/s) up`` and down as ``down diag(s)``; ``None`` where that is not so."""
        down = replace(up, kind=_PARTNERS[up.kind])
        pair = (up, down)
        if not all(one in source.stored for one in pair for source in (self._original, self._converted)):
            return None
        if any(self._converted.scheme(one) is None for one in pair):
            return None
        try:
            rows = _ratio(self._original.matrix(up), self._converted.matrix(up), 1)
            columns = _ratio(self._original.matrix(down), self._converted.matrix(down), 0)
        except FormatError:  # the fault of the one that cannot be read, which says so when its turn comes
            return None
        if rows is None or columns is None or rows.shape != columns.shape:
            return None
        agree = (rows * columns).log2().abs() <= RECIPROCAL
        if float(agree.float().mean()) < _AGREEING:
            return None
        factors = torch.where(agree, (columns / rows).sqrt(), 1.0)
        return factors if float(factors.log2().abs().mean()) > SCALED else None


def _ratio(before: Tensor, after: Tensor, dim: int) -> Tensor | None:
    """What rows or columns were multiplied by, the least squares; ``None`` where numbers are gone or turned around."""
    signal, product = before.square().sum(dim), (before * after).sum(dim)
    ratio = torch.where(signal > _NOTHING, product / signal.clamp(min=_NOTHING), 1.0)
    return ratio if bool((ratio.isfinite() & (ratio > 0)).all()) else None
