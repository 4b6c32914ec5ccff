"""The report as one HTML page that needs nothing else: no network, no fonts, a script of its own for sorting.

The page allows its own style and script by their hashes and nothing besides, so that not even a fault of escaping lets
a name in a checkpoint run.
"""

from __future__ import annotations

import base64
import hashlib
import math
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from qconvert import __version__
from qconvert.numerics.error import ErrorSums
from qconvert.parity.because import bound, interval, number
from qconvert.parity.outputs import pictures
from qconvert.parity.outputs.pictures import BarChart, Chart, bar_chart, chart
from qconvert.parity.outputs.sections import (
    MODES,
    LayerTable,
    by_layer,
    columns,
    deciding,
    headlines,
    parts,
    size,
    whole,
    words,
)
from qconvert.parity.report import ParityReport

SHOWN = 500
"""Tensors in the table that can be sorted: the worst."""

CAUSES = 200
"""Causes that are listed."""

STEPS = 8
"""Colours of the heat map, the worst first."""

PERCENTILES = "kl_percentiles"
"""The curve whose ends are looked at."""

SPAN = 3.0
"""dB that the colours span at least: less than half the noise is no difference that colours should shout about."""

MEANINGS = {
    "kl_lens": "Of what both models would say if they ended after the layer; behind the last it is that of the models.",
    "hidden_cosine": "Of what the layer gives in both models, mean of all tokens.",
    "hidden_error": "How far the layer's output is off, as a share of its size, mean of all tokens.",
    "router_overlap": "Share of the original's experts that the converted model chose too.",
    "router_flips": "Share of tokens that went to any other expert.",
    "router_mass_moved": "Share of the routing weights that went to other experts.",
    "state_drift": "Relative error of the memories of linear attention at the end of the windows.",
    "execution_error": "Largest relative error of a block that is fed what the engine fed it.",
}
"""What the numbers of layers are, for those who look at their charts."""

FEW = 10
"""Experts in the table beside their picture."""

_HERE = Path(__file__).parent


@dataclass(frozen=True, slots=True, kw_only=True)
class HeatMap:
    """SQNR by layer and role; a cell is its text and the number of its colour, ``None`` where nothing is rounded.

    Colours go from ``worst`` to ``high``, numbers from ``low`` to ``high``.
    """

    roles: tuple[str, ...]
    rows: tuple[tuple[int, tuple[tuple[str, int] | None, ...]], ...]
    low: str
    high: str
    worst: str


def as_page(report: ParityReport) -> str:
    """The whole page; everything that a report says is escaped."""
    template = _environment().get_template("page.html.jinja")
    style, script = ((_HERE / name).read_text(encoding="utf-8").strip() for name in ("page.css", "page.js"))
    return template.render(
        report=report,
        version=__version__,
        style=Markup(style),
        script=Markup(script),
        policy=f"default-src 'none'; style-src {_hash(style)}; script-src {_hash(script)}; base-uri 'none'; "
        "form-action 'none'",
        deciding=deciding(report),
        headlines=headlines(report),
        modes=MODES,
        numbers=whole(report),
        parts=parts(report),
        part_columns=columns([one for members in parts(report).values() for one in members]),
        layers=layer_charts(report),
        heat=heat_map(report),
        experts=expert_chart(report),
        worst_experts=sorted(report.experts, key=lambda one: -math.inf if math.isnan(one.sqnr_db) else one.sqnr_db)[
            :FEW
        ],
        curves=curve_charts(report),
        worths=worth_bars(report),
        worth_layers=worth_chart(report),
        tensors=report.tensors[:SHOWN],
        causes=report.causes[:CAUSES],
        steps=STEPS,
        worst_low=-math.inf,
        worst_high=math.inf,
        frame=pictures,
    )


@cache
def _environment() -> Environment:
    environment = Environment(
        loader=FileSystemLoader(_HERE), autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters |= {
        "number": number, "interval": interval, "bound": bound, "size": size, "words": words, "sortable": _sortable,
    }  # fmt: skip
    return environment


def _hash(text: str) -> str:
    digest = hashlib.sha256(text.encode("utf-8")).digest()
    return f"'sha256-{base64.b64encode(digest).decode('ascii')}'"


def _sortable(value: float, nan: float) -> str:
    """A number as a script reads it; NaN is sorted as ``nan``."""
    value = nan if math.isnan(value) else value
    return repr(value) if math.isfinite(value) else "Infinity" if value > 0 else "-Infinity"


def layer_charts(report: ParityReport) -> tuple[Chart, ...]:
    """One chart for each number that layers have, a line for each place that it was measured in."""
    return tuple(
        chart(
            f"{words(table.name)} by layer",
            "layer",
            f"{words(table.name)}{_unit(next(iter(table.found.values())).unit)}",
            [
                (
                    where,
                    [
                        (float(layer), table.found[where, layer].value)
                        for layer in table.layers
                        if (where, layer) in table.found
                    ],
                )
                for where in _seen(table)
            ],
            meaning=MEANINGS.get(table.name, ""),
        )
        for table in by_layer(report)
    )


def _seen(table: LayerTable) -> tuple[str, ...]:
    """The places whose lines can be seen: of several that are the same, the last."""
    lines = {
        where: [table.found[where, layer].value for layer in table.layers if (where, layer) in table.found]
        for where in table.wheres
    }
    return tuple(where for n, where in enumerate(lines) if lines[where] not in list(lines.values())[n + 1 :])


def curve_charts(report: ParityReport) -> tuple[Chart, ...]:
    """Curves of one name in one chart, a line for each place."""
    names = dict.fromkeys(one.name for one in report.curves)
    groups = [[one for one in report.curves if one.name == name] for name in names]
    return tuple(
        chart(
            words(group[0].name),
            group[0].x_label,
            group[0].y_label,
            [(one.where, one.points) for one in group],
            evenly=group[0].name == PERCENTILES,
        )
        for group in groups
    )


def expert_chart(report: ParityReport) -> Chart | None:
    """SQNR of every expert over the tokens that visited it."""
    if not report.experts:
        return None
    points = [(float(one.tokens), one.sqnr_db) for one in report.experts]
    return chart(
        "Experts: use against error", "tokens that visited the expert", "SQNR, dB", [("experts", points)], joined=False
    )


def worth_bars(report: ParityReport) -> BarChart | None:
    """What each group of roles is worth."""
    found = report.attribution
    if found is None or not found.groups:
        return None
    rows = [(one.group, one.worth, one.low, one.high) for one in found.groups]
    return bar_chart("What groups of roles are worth", "KL less with the tensors of the original, nats", rows)


def worth_chart(report: ParityReport) -> Chart | None:
    """What the layers of groups that matter are worth."""
    found = report.attribution
    if found is None or not found.layers:
        return None
    lines = {
        name: [(float(one.layer or 0), one.worth) for one in found.layers if one.group == name]
        for name in dict.fromkeys(one.group for one in found.layers)
    }
    return chart("What layers are worth", "layer", "KL less, nats", list(lines.items()))


def heat_map(report: ParityReport) -> HeatMap | None:
    """SQNR of the tensors of each role in each layer together; bit-equal ones are blank."""
    sums: dict[tuple[int, str], ErrorSums] = {}
    for one in report.tensors:
        if one.role.layer is not None and one.scheme is not None:
            key = (one.role.layer, one.role.path)
            sums[key] = sums.get(key, ErrorSums()) + one.sums
    if not sums:
        return None
    values = [found.sqnr_db for found in sums.values() if math.isfinite(found.sqnr_db)]
    low, high = (min(values), max(values)) if values else (0.0, 0.0)
    worst = min(low, high - SPAN)
    roles = tuple(sorted({role for _, role in sums}))

    def cell(layer: int, role: str) -> tuple[str, int] | None:
        if (layer, role) not in sums:
            return None
        value = sums[layer, role].sqnr_db
        if not math.isfinite(value):
            return number(value), STEPS - 1 if value > 0 else 0
        return f"{value:.1f}", min(STEPS - 1, int((value - worst) / (high - worst) * STEPS))

    return HeatMap(
        roles=roles,
        rows=tuple((layer, tuple(cell(layer, role) for role in roles)) for layer in sorted({at for at, _ in sums})),
        low=f"{low:.1f}",
        high=f"{high:.1f}",
        worst=f"{worst:.1f}",
    )


def _unit(unit: str) -> str:
    return f", {unit}" if unit else ""
