"""What a decision says of itself: for machines, and as a picture of what every budget buys."""

from __future__ import annotations

import json
from typing import Any
from xml.sax.saxutils import escape

from qconvert.budget.decide import Point, Way
from qconvert.budget.run import Budgeted
from qconvert.parity.outputs.pictures import BOTTOM, HEIGHT, LEFT, TOP, WIDTH, Chart, Line, chart

_LEGEND = 20
_BEST, _SINGLE, _THIS = "#2166ac", "#b2182b", "#ef8a62"


def document(found: Budgeted) -> dict[str, Any]:
    """The decision, what a byte more would buy, and what other budgets buy, as plain JSON."""
    decision = found.decision
    return {
        "bits": found.bits(decision.size),
        "file_bytes": found.file_bytes,
        "predicted_kl": decision.kl,
        "lower_bound": decision.bound,
        "proven": decision.proven,
        "kl_per_byte": decision.price,
        "text": dict(found.losses.text),
        "parts": [_part(way) for way in decision.ways],
        "frontier": [_point(found, point) for point in found.points],
        "uniform": {name: _point(found, point) for name, point in found.uniform},
    }


def _part(way: Way) -> dict[str, Any]:
    return {
        "group": way.part.group,
        "layer": way.part.layer,
        "scheme": way.scheme,
        "bytes": way.size.tensors,
        "predicted_kl": way.kl,
    }


def _point(found: Budgeted, point: Point) -> dict[str, Any]:
    return {
        "file_bytes": found.beside + point.size.both,
        "bits": found.bits(point.size),
        "predicted_kl": point.kl,
        "proven": point.proven,
    }


def document_text(found: Budgeted) -> str:
    """``document`` as a file has it."""
    return json.dumps(document(found), indent=1, allow_nan=False) + "\n"


def picture(found: Budgeted) -> str:
    """An SVG document: predicted KL over bytes of the best decisions, of uniform ones, and of the one that was made."""

    def place(point: Point) -> tuple[float, float]:
        return (found.beside + point.size.both) / 1e9, point.kl

    title = "What bytes buy: predicted KL to the original"
    asked = Point(size=found.decision.size, kl=found.decision.kl, proven=found.decision.proven)
    series = [
        ("best of all mixtures", [place(point) for point in found.points]),
        *((name, [place(point)]) for name, point in found.uniform),
        ("this conversion", [place(asked)]),
    ]
    drawn = chart(title, "GB of weights", "KL, nats", series)
    best, *single, this = drawn.lines
    parts = [f'<path d="{best.path}" fill="none" stroke="{_BEST}"/>', _dots(best, _BEST, 4)]
    parts += [_dots(line, _SINGLE, 8) for line in single] + [_dots(this, _THIS, 8)]
    return "\n".join([*_frame(drawn), *parts, *_legend(), "</svg>", ""])


def _frame(drawn: Chart) -> list[str]:
    floor = HEIGHT - BOTTOM
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 {-_LEGEND} {WIDTH} {HEIGHT + _LEGEND}" '
        'font-family="sans-serif" font-size="11" role="img">',
        f"<title>{escape(drawn.title)}</title>",
        f"<desc>{escape(drawn.description)}</desc>",
        f'<rect y="{-_LEGEND}" width="100%" height="100%" fill="#fff"/>',
    ]
    for x, text in drawn.x_ticks:
        parts.append(f'<path d="M{x:.1f} {TOP}V{floor}" stroke="#eee"/>')
        parts.append(f'<text x="{x:.1f}" y="{floor + 16}" text-anchor="middle">{text}</text>')
    for y, text in drawn.y_ticks:
        parts.append(f'<path d="M{LEFT} {y:.1f}H{WIDTH}" stroke="#eee"/>')
        parts.append(f'<text x="{LEFT - 8}" y="{y + 4:.1f}" text-anchor="end">{text}</text>')
    middle = (LEFT + WIDTH) / 2
    parts.append(f'<text x="{middle}" y="{floor + 34}" text-anchor="middle">{escape(drawn.x.label)}</text>')
    parts.append(f'<text x="4" y="{TOP - 12}">{escape(drawn.y.label)}</text>')
    return parts


def _dots(line: Line, colour: str, size: int) -> str:
    said = f"<title>{escape(line.label)}</title>"
    return f'<path d="{line.dots}" stroke="{colour}" stroke-width="{size}" stroke-linecap="round">{said}</path>'


def _legend() -> list[str]:
    parts, across = [], LEFT
    for label, colour in (("best of all mixtures", _BEST), ("one scheme", _SINGLE), ("this conversion", _THIS)):
        parts.append(f'<circle cx="{across + 5}" cy="{-_LEGEND / 2}" r="4" fill="{colour}"/>')
        parts.append(f'<text x="{across + 14}" y="{-_LEGEND / 2 + 4}">{label}</text>')
        across += 40 + 6 * len(label)
    return parts
