"""Where the marks of a chart lie: numbers to places in an SVG, in units of its view box."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from qconvert.parity.because import number

WIDTH, HEIGHT = 720, 260
LEFT, RIGHT, TOP, BOTTOM = 86, 16, 12, 44

NAMES, BAR = 200, 26
"""Room for the names beside bars, and from one bar to the next."""

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
        order: numbers that lie evenly apart, whatever they are; empty on other axes.
        ticks: numbers that are written at it, in words.
    """

    label: str
    low: float
    high: float
    log: bool
    ticks: tuple[tuple[float, str], ...]
    order: tuple[float, ...] = ()

    def share(self, value: float) -> float:
        """How far along the axis ``value`` lies, 0 to 1."""
        if self.order:
            return self.order.index(value) / max(1, len(self.order) - 1)
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
    """A picture of some series over one axis, with the places of its ticks; ``meaning`` says what is drawn."""

    title: str
    description: str
    x: Axis
    y: Axis
    x_ticks: tuple[tuple[float, str], ...]
    y_ticks: tuple[tuple[float, str], ...]
    lines: tuple[Line, ...]
    meaning: str = ""


def chart(
    title: str,
    x_label: str,
    y_label: str,
    series: Sequence[tuple[str, Points]],
    *,
    joined: bool = True,
    evenly: bool = False,
    meaning: str = "",
) -> Chart:
    """Lines through points, or with ``joined=False`` the points alone; those that are not finite are left out.

    ``evenly`` puts all x that occur evenly apart: the ends of a distribution get as much room as its middle.
    """
    drawn = [(label, [(x, y) for x, y in points if math.isfinite(x) and math.isfinite(y)]) for label, points in series]
    across = [x for _, points in drawn for x, _ in points]
    x = _even_axis(x_label, across) if evenly and across else axis(x_label, across)
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
        meaning=meaning,
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class Bar:
    """A named bar from zero to its value, [x, width] in units of the view box, and the ends of its interval."""

    label: str
    text: str
    y: float
    x: float
    width: float
    low: float
    high: float


@dataclass(frozen=True, slots=True, kw_only=True)
class BarChart:
    """Bars below each other over one axis; ``height`` is that of the view box."""

    title: str
    description: str
    label: str
    height: float
    zero: float
    ticks: tuple[tuple[float, str], ...]
    bars: tuple[Bar, ...]


def bar_chart(title: str, label: str, rows: Sequence[tuple[str, float, float, float]]) -> BarChart:
    """A bar for each finite (name, value, low, high), with a line from low to high."""
    drawn = [row for row in rows if all(map(math.isfinite, row[1:]))]
    x = axis(label, [0.0, *(value for row in drawn for value in row[1:])], may_be_log=False)

    def across(value: float) -> float:
        return round(NAMES + x.share(value) * (WIDTH - NAMES - 2 * RIGHT), 1)

    zero = across(0.0)
    bars = tuple(
        Bar(
            label=name, text=number(value), y=TOP + BAR * n, x=min(zero, across(value)),
            width=round(abs(across(value) - zero), 1), low=across(low), high=across(high),
        )
        for n, (name, value, low, high) in enumerate(drawn)
    )  # fmt: skip
    said = "; ".join(f"{name}: {number(value)}" for name, value, _, _ in drawn)
    return BarChart(
        title=title,
        description=f"{label}. {said}." if said else f"{label}: nothing finite to draw.",
        label=label,
        height=TOP + BAR * len(bars) + BOTTOM,
        zero=zero,
        ticks=tuple((across(value), text) for value, text in x.ticks),
        bars=bars,
    )


def axis(label: str, values: Iterable[float], *, may_be_log: bool = True) -> Axis:
    """An axis over finite ``values``: logarithmic where they are positive, but for zeros, and far apart."""
    values = list(values)
    positive = [value for value in values if value > 0]
    if may_be_log and positive and min(values) >= 0 and max(positive) > WIDE * min(positive):
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
    ticks = tuple((place, text) for place, text in zip(places, _apart(places, step), strict=True))
    return Axis(label=label, low=low, high=high, log=False, ticks=ticks)


def _even_axis(label: str, values: Iterable[float]) -> Axis:
    """An axis with a tick at each of the ``values``."""
    order = tuple(sorted(set(values)))
    ticks = tuple((value, f"{value:g}") for value in order)
    return Axis(label=label, low=order[0], high=order[-1], log=False, ticks=ticks, order=order)


def _apart(places: Sequence[float], step: float) -> list[str]:
    """Numbers a ``step`` apart in words that differ."""
    words = [number(round(place, 12)) for place in places]
    if len(set(words)) == len(words):
        return words
    return [f"{place:.{max(0, math.ceil(-math.log10(step)))}f}" for place in places]


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
