"""Where the marks of a chart lie: numbers to places in an SVG, in units of its view box."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from qconvert.parity.because import number

WIDTH, HEIGHT = 720, 260
LEFT, RIGHT, TOP, BOTTOM = 70, 16, 12, 44

WIDE = 50.0
"""Largest over smallest from which an axis of positive numbers is logarithmic."""

Points = Sequence[tuple[float, float]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Axis:
    """One axis.

    Attributes:
        label: what runs along it.
        low: its first number; its logarithm on a logarithmic axis.
        high: its last.
        ticks: numbers that are written at it, in words.
    """

    label: str
    low: float
    high: float
    log: bool
    ticks: tuple[tuple[float, str], ...]

    def share(self, value: float) -> float:
        """How far along the axis ``value`` lies, 0 to 1."""
        return ((math.log10(value) if self.log else value) - self.low) / (self.high - self.low)


@dataclass(frozen=True, slots=True, kw_only=True)
class Line:
    """A series: its marks as an SVG path, and the numbers themselves for those who read them."""

    label: str
    path: str
    dots: str
    points: tuple[tuple[float, float], ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Chart:
    """A picture of some series over one axis, with the places of its ticks."""

    title: str
    description: str
    x: Axis
    y: Axis
    x_ticks: tuple[tuple[float, str], ...]
    y_ticks: tuple[tuple[float, str], ...]
    lines: tuple[Line, ...]


def chart(
    title: str, x_label: str, y_label: str, series: Sequence[tuple[str, Points]], *, joined: bool = True
) -> Chart:
    """Lines through points, or with ``joined=False`` the points alone; those that are not finite are left out."""
    drawn = [(label, [(x, y) for x, y in points if math.isfinite(x) and math.isfinite(y)]) for label, points in series]
    x = axis(x_label, [x for _, points in drawn for x, _ in points])
    y = axis(y_label, [y for _, points in drawn for _, y in points])

    def place(point: tuple[float, float]) -> str:
        return f"{_across(x.share(point[0])):.1f} {_down(y.share(point[1])):.1f}"

    lines = []
    for label, points in drawn:
        shown = [point for point in points if (point[0] > 0 or not x.log) and (point[1] > 0 or not y.log)]
        places = [place(point) for point in shown]
        lines.append(
            Line(
                label=label,
                path="M" + "L".join(places) if joined and places else "",
                dots="".join(f"M{each}h0" for each in places),
                points=tuple(points),
            )
        )
    return Chart(
        title=title,
        description=_describe(y_label, drawn),
        x=x,
        y=y,
        x_ticks=tuple((_across(x.share(value)), text) for value, text in x.ticks),
        y_ticks=tuple((_down(y.share(value)), text) for value, text in y.ticks),
        lines=tuple(lines),
    )


def axis(label: str, values: Iterable[float]) -> Axis:
    """An axis over finite ``values``: logarithmic where they are positive, but for zeros, and far apart."""
    values = list(values)
    positive = [value for value in values if value > 0]
    if positive and min(values) >= 0 and max(positive) > WIDE * min(positive):
        first, last = math.floor(math.log10(min(positive))), math.ceil(math.log10(max(positive)))
        stride = max(1, (last - first) // 6)
        ticks = tuple((10.0**power, f"{10.0**power:g}") for power in range(first, last + 1, stride))
        return Axis(label=label, low=first, high=last, log=True, ticks=ticks)
    low, high = (min(values), max(values)) if values else (0.0, 1.0)
    if low == high:
        low, high = low - (abs(low) or 1) * 0.1, high + (abs(high) or 1) * 0.1
    step = _round_step((high - low) / 5)
    if all(value.is_integer() for value in values):  # between two layers there is none
        step = max(step, 1.0)
    low, high = math.floor(low / step) * step, math.ceil(high / step) * step
    places = [low + i * step for i in range(round((high - low) / step) + 1)]
    ticks = tuple((place, number(round(place, 12))) for place in places)
    return Axis(label=label, low=low, high=high, log=False, ticks=ticks)


def _round_step(step: float) -> float:
    power = 10.0 ** math.floor(math.log10(step))
    return power * next(factor for factor in (1, 2, 5, 10) if factor * power >= step * 0.999)


def _across(share: float) -> float:
    return LEFT + share * (WIDTH - LEFT - RIGHT)


def _down(share: float) -> float:
    return HEIGHT - BOTTOM - share * (HEIGHT - TOP - BOTTOM)


def _describe(label: str, series: Sequence[tuple[str, Points]]) -> str:
    said = []
    for name, points in series:
        if points:
            low, high = min(points, key=lambda p: p[1]), max(points, key=lambda p: p[1])
            said.append(f"{name}: from {number(low[1])} at {number(low[0])} to {number(high[1])} at {number(high[0])}")
    return f"{label}. {'; '.join(said)}." if said else f"{label}: nothing finite to draw."
