"""The frontier as a picture: KL over bytes, a line a method."""

from __future__ import annotations

from collections.abc import Sequence
from importlib import import_module
from pathlib import Path

from .table import Row


def draw(table: Sequence[Row], out: Path) -> None:
    """Write the picture as SVG, the same bytes from the same numbers.

    Raises:
        ModuleNotFoundError: matplotlib is not installed.
    """
    matplotlib = import_module("matplotlib")  # for this alone, so no requirement
    matplotlib.use("svg")
    matplotlib.rcParams["svg.hashsalt"] = "quality"
    pyplot = import_module("matplotlib.pyplot")
    lines: dict[str, list[Row]] = {}
    for row in table:
        if row.kl is not None:
            lines.setdefault(row.measured["title"], []).append(row)
    figure, axes = pyplot.subplots(figsize=(8, 5), layout="constrained")
    for title, found in lines.items():
        found = sorted(found, key=lambda row: row.measured["text_bytes"])
        mine = found[0].measured["ours"]
        kl = [(row.kl.value, row.kl.low, row.kl.high) for row in found if row.kl is not None]
        axes.errorbar(
            [row.measured["text_bytes"] / 1e6 for row in found],
            [value for value, _, _ in kl],
            yerr=[[value - low for value, low, _ in kl], [high - value for value, _, high in kl]],
            marker="o" if mine else "x",
            linestyle="-" if mine else ":",
            label=title,
            capsize=2,
        )
    axes.set(xlabel="text decoder, MB", ylabel="KL on held-out text, nats", yscale="log")
    axes.legend(fontsize="small")
    figure.savefig(out, metadata={"Date": None})
    pyplot.close(figure)
