"""The picture of docs/scale.md: time and memory against layers, side by side."""

from __future__ import annotations

from collections.abc import Mapping
from importlib import import_module
from pathlib import Path
from typing import Any

from .page import conversions, time_line


def draw(numbers: Mapping[str, Any], out: Path) -> None:
    """Write the picture as SVG, the same bytes from the same numbers.

    Raises:
        ModuleNotFoundError: matplotlib is not installed.
    """
    matplotlib = import_module("matplotlib")  # for this alone, so no requirement
    matplotlib.use("svg")
    matplotlib.rcParams["svg.hashsalt"] = "scale"
    pyplot = import_module("matplotlib.pyplot")
    measured = conversions(numbers)
    line = time_line(measured)
    layers = [one.layers for one in measured]
    figure, (time, memory) = pyplot.subplots(1, 2, figsize=(9, 3.4), layout="constrained")
    time.plot(layers, [line(one.input_bytes) for one in measured], color="0.6", label="line of least squares")
    time.plot(layers, [one.wall for one in measured], "o", label="conversion to int4")
    time.plot(layers, [one.floor for one in measured], "x", label="disk alone")
    time.set(title="time", xlabel="layers", ylabel="seconds", ylim=(0, None), xticks=layers)
    time.legend()
    memory.plot(layers, [one.peak_rss / 1e6 for one in measured], "o-", label="peak RSS")
    memory.set(title="memory", xlabel="layers", ylabel="MB", ylim=(0, 2 * measured[-1].peak_rss / 1e6), xticks=layers)
    memory.legend()
    figure.savefig(out, metadata={"Date": None})
    pyplot.close(figure)
