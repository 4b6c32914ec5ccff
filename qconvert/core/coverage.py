"""How many tokens of a text each expert got."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from qconvert.core.role import Section

FEW = 50
"""Tokens below which means of an expert's inputs are mostly noise."""

_BLOCKS = {Section.TEXT: "layers", Section.MTP: "mtp.layers"}


def layer_name(section: Section, layer: int | None) -> str:
    """What a layer is called beside others of the decoder and the prediction head: ``layers.3``, ``mtp.layers.0``."""
    return f"{_BLOCKS[section]}.{layer}"


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

    @classmethod
    def of(cls, name: str, inputs: int, tokens: Mapping[int, int]) -> LayerCoverage:
        """Of the ``tokens`` that each expert got, by its number."""
        ordered = sorted(tokens.values())
        return cls(
            name=name,
            experts=len(ordered),
            inputs=inputs,
            unreached=tuple(number for number, count in sorted(tokens.items()) if not count),
            few=sum(count < FEW for count in ordered),
            fewer_than_inputs=sum(count < inputs for count in ordered),
            least=ordered[0],
            median=ordered[len(ordered) // 2],
            most=ordered[-1],
        )

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

    @classmethod
    def of_entry(cls, entry: Mapping[str, Any]) -> LayerCoverage:
        """The inverse of ``entry``."""
        return cls(
            name=entry["layer"],
            experts=entry["experts"],
            inputs=entry["inputs"],
            unreached=tuple(entry["unreached"]),
            few=entry[f"fewer_than_{FEW}"],
            fewer_than_inputs=entry["fewer_than_inputs"],
            least=entry["least"],
            median=entry["median"],
            most=entry["most"],
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Coverage:
    """All layers of a model over so many ``tokens``."""

    layers: Sequence[LayerCoverage]
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
