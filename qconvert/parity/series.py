"""Numbers that belong together and are looked at as a picture; no limit judges them."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class Curve:
    """One number over another.

    Attributes:
        name: what it shows, for example ``kl_percentiles``.
        where: the mode that it was measured in, as in a ``Metric``.
        x_label: what runs along, with its unit.
        y_label: what was measured, with its unit.
        points: (x, y), x ascending.
    """

    name: str
    where: str
    x_label: str
    y_label: str
    points: tuple[tuple[float, float], ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class ExpertUse:
    """How often the router chose an expert, beside what rounding cost that expert.

    Attributes:
        tokens: that visited it in the original.
        sqnr_db: of its matrices together; infinite where nothing was rounded.
    """

    layer: int
    expert: int
    tokens: int
    sqnr_db: float
