"""How many tokens each expert got in a run over text, and what to do where they are few."""

from __future__ import annotations

import math
from collections.abc import Sequence

from calibration.statistics import LayerVisits
from qconvert.core.coverage import FEW, Coverage, LayerCoverage, layer_name


def cover(layers: Sequence[LayerVisits], tokens: int) -> Coverage:
    """What the experts of ``layers`` got out of ``tokens``."""
    return Coverage(
        layers=tuple(
            LayerCoverage.of(
                layer_name(layer.section, layer.layer), layer.inputs, dict(enumerate(layer.tokens.tolist()))
            )
            for layer in layers
        ),
        tokens=tokens,
    )


def warnings(coverage: Coverage, again: str = "") -> tuple[str, ...]:
    """What is wrong and what to do, one sentence each; nothing where every expert got ``FEW`` tokens.

    Args:
        coverage: of the statistics.
        again: the command that has the options which the advice names, where it is not the one that is running.
    """
    found = []
    advice = _advice(coverage) + (f" These are options of `{again}`." if again else "")
    if coverage.unreached:
        worst = max(coverage.layers, key=lambda layer: len(layer.unreached))
        found.append(
            f"{coverage.unreached:,} of {coverage.experts:,} experts got no token, most of them "
            f"({len(worst.unreached)}) in {worst.name}: they are rounded by what their layer's inputs are like. "
            f"{advice}"
        )
    few = coverage.few - coverage.unreached
    if few:
        found.append(
            f"{few:,} of {coverage.experts:,} experts got fewer than {FEW} tokens: what is known of their inputs is "
            f"mostly noise and counts for less. {advice}"
        )
    return tuple(found)


def _advice(coverage: Coverage) -> str:
    least = min((layer.least for layer in coverage.layers), default=0)
    if least:
        need = -(-coverage.tokens * FEW // least)
        return (
            f"If rare experts stay as rare, about {_rounded(need):,} tokens give every one {FEW}: raise --tokens "
            "and give more text with --text."
        )
    return (
        "Give more text with --text and raise --tokens, first of all in other domains and languages: an expert "
        f"that none of {coverage.tokens:,} tokens reached is seldom a matter of their number."
    )


def _rounded(number: int) -> int:
    """Two digits are all that such a guess has."""
    unit = int("1" + "0" * max(0, len(str(number)) - 2))
    return math.ceil(number / unit) * unit
