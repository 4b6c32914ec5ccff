"""How many tokens each expert got, and what to do where they are few."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from calibration.sites import layer_prefix
from calibration.statistics import LayerVisits

FEW = 50
"""Tokens below which means of an expert's inputs are mostly noise."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerCoverage:
    """The experts of one layer.

    Attributes:
        name: such as ``layers.3``.
        experts: how many there are.
        inputs: K of gate and up: fewer tokens than that leave directions of their inputs unseen.
        unreached: experts that no token reached, by number.
        few: experts with fewer than ``FEW`` tokens, those without any among them.
        fewer_than_inputs: experts with fewer tokens than inputs, those among them.
        least: tokens of the expert that got the fewest.
        median: of the tokens that experts got.
        most: tokens of the expert that got the most.
    """

    name: str
    experts: int
    inputs: int
    unreached: tuple[int, ...]
    few: int
    fewer_than_inputs: int
    least: int
    median: int
    most: int

    def entry(self) -> dict[str, Any]:
        """As plain JSON."""
        return {
            "layer": self.name,
            "experts": self.experts,
            "unreached": list(self.unreached),
            f"fewer_than_{FEW}": self.few,
            "fewer_than_inputs": self.fewer_than_inputs,
            "inputs": self.inputs,
            "least": self.least,
            "median": self.median,
            "most": self.most,
        }


@dataclass(frozen=True, slots=True, kw_only=True)
class Coverage:
    """All layers of a model over so many ``tokens``."""

    layers: tuple[LayerCoverage, ...]
    tokens: int

    @property
    def experts(self) -> int:
        """Experts of all layers."""
        return sum(layer.experts for layer in self.layers)

    @property
    def unreached(self) -> int:
        """Those that no token reached."""
        return sum(len(layer.unreached) for layer in self.layers)

    @property
    def few(self) -> int:
        """Those with fewer than ``FEW`` tokens."""
        return sum(layer.few for layer in self.layers)

    @property
    def fewer_than_inputs(self) -> int:
        """Those with fewer tokens than inputs."""
        return sum(layer.fewer_than_inputs for layer in self.layers)

    def warnings(self) -> tuple[str, ...]:
        """What is wrong and what to do, one sentence each; nothing where every expert got ``FEW`` tokens."""
        found = []
        advice = self._advice()
        if self.unreached:
            worst = max(self.layers, key=lambda layer: len(layer.unreached))
            found.append(
                f"{self.unreached:,} of {self.experts:,} experts got no token, most of them ({len(worst.unreached)}) "
                f"in {worst.name}: they are rounded by what their layer's inputs are like. {advice}"
            )
        few = self.few - self.unreached
        if few:
            found.append(
                f"{few:,} of {self.experts:,} experts got fewer than {FEW} tokens: what is known of their inputs is "
                f"mostly noise and counts for less. {advice}"
            )
        return tuple(found)

    def _advice(self) -> str:
        least = [layer.least for layer in self.layers]
        if min(least):
            need = -(-self.tokens * FEW // min(least))
            return (
                f"If rare experts stay as rare, about {_rounded(need):,} tokens give every one {FEW}: raise --tokens "
                "and give more text."
            )
        return (
            "Give more text with --text and raise --tokens, first of all in other domains and languages: an expert "
            f"that none of {self.tokens:,} tokens reached is seldom a matter of their number."
        )


def cover(layers: Sequence[LayerVisits], tokens: int) -> Coverage:
    """What the experts of ``layers`` got out of ``tokens``."""
    return Coverage(layers=tuple(_of_layer(layer) for layer in layers), tokens=tokens)


def _of_layer(layer: LayerVisits) -> LayerCoverage:
    got = layer.tokens.tolist()
    ordered = sorted(got)
    return LayerCoverage(
        name=layer_prefix(layer.section, layer.layer),
        experts=len(got),
        inputs=layer.inputs,
        unreached=tuple(number for number, count in enumerate(got) if not count),
        few=sum(count < FEW for count in got),
        fewer_than_inputs=sum(count < layer.inputs for count in got),
        least=ordered[0],
        median=ordered[len(ordered) // 2],
        most=ordered[-1],
    )


def _rounded(number: int) -> int:
    """Two digits are all that such a guess has."""
    unit = int("1" + "0" * max(0, len(str(number)) - 2))
    return math.ceil(number / unit) * unit
