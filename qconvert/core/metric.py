"""The only thing that a report contains: a number, its uncertainty, its limit and the verdict."""

from __future__ import annotations

import enum
from dataclasses import dataclass
from typing import Literal


class Verdict(enum.Enum):
    """What a limit says of a number."""

    PASS = "pass"
    FAIL = "fail"
    AMBIGUOUS = "ambiguous"


@dataclass(frozen=True, slots=True, kw_only=True)
class Metric:
    """One measured number.

    Attributes:
        name: what was measured, for example ``kl_mean``.
        where: the tensor, role or mode that it was measured on.
        low: lower end of the confidence interval; equal to ``value`` where the number is exact.
        high: upper end.
        limit: the bound, or ``None`` for a number that is only reported.
        unit: ``nats``, ``dB``, ``fraction``, ``count`` or empty.
        better: whether small or large values are good: a limit is a maximum or a minimum.
        reason: why the limit is this number; empty without one.
        layer: the decoder layer that the number is of; ``None`` for one of a tensor or of the whole model.
    """

    name: str
    where: str
    value: float
    low: float
    high: float
    unit: str
    limit: float | None = None
    better: Literal["low", "high"] = "low"
    layer: int | None = None
    reason: str = ""

    @property
    def place(self) -> str:
        """Where it was measured, the layer included."""
        return self.where if self.layer is None else f"{self.where}, layer {self.layer}"

    @property
    def verdict(self) -> Verdict:
        """``AMBIGUOUS`` when the limit lies inside [low, high]; NaN fails, with a limit or without."""
        if self.value != self.value:
            return Verdict.FAIL
        if self.limit is None:
            return Verdict.PASS
        low, high, limit = self.low, self.high, self.limit
        if self.better == "high":
            low, high, limit = -self.high, -self.low, -self.limit
        if high <= limit:
            return Verdict.PASS
        return Verdict.FAIL if low > limit else Verdict.AMBIGUOUS


def exact(
    name: str,
    where: str,
    value: float,
    unit: str = "",
    *,
    better: Literal["low", "high"] = "low",
    layer: int | None = None,
) -> Metric:
    """A metric without uncertainty."""
    return Metric(name=name, where=where, value=value, low=value, high=value, unit=unit, better=better, layer=layer)
