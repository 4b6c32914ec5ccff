"""A ``quantization_config`` with ``quant_method: fp8`` read."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from qconvert.core.dtypes import DType
from qconvert.core.errors import SourceError
from qconvert.core.scheme import Activation, Block, Float, ScaleSpec, Scheme
from qconvert.formats.declaration import Declaration, Declared, names_of, whole_number
from qconvert.formats.fp8_block import Fp8Block


@dataclass(frozen=True, slots=True, kw_only=True)
class Fp8:
    """``quant_method: fp8``: every linear module but those listed, each by its name or that of a module around it."""

    declaration: Declaration
    kept: frozenset[str]
    complete: bool = True

    def of(self, module: str) -> Declaration | None:
        """See ``Declared.of``."""
        steps = module.split(".")
        inside = any(".".join(steps[:i]) in self.kept for i in range(1, len(steps) + 1))
        return None if inside else self.declaration


def read_fp8(block: Mapping[str, Any]) -> Declared:
    """What the size of tiles and the two lists of names declare.

    Raises:
        SourceError: anything but tiles and dynamic activations; the message names it.
    """
    where = "quantization_config"
    size = block.get("weight_block_size")
    if not isinstance(size, list) or len(size) != 2:
        raise SourceError(f"config.json: {where}.weight_block_size is {size!r}; only tiles can be read, not one scale")
    if block.get("activation_scheme", "dynamic") != "dynamic":
        raise SourceError(f"config.json: {where}.activation_scheme is {block['activation_scheme']!r}, not 'dynamic'")
    tall, wide = (whole_number(side, f"{where}.weight_block_size") for side in size)
    grid = Float(kind="e4m3fn")
    scheme = Scheme(
        grid=grid,
        blocking=Block(rows=tall, cols=wide),
        scale=ScaleSpec(dtype=DType.BF16),
        activation=Activation(kind="dynamic", grid=grid, group=wide),
    )
    kept = {
        name
        for field in ("modules_to_not_convert", "ignored_layers")
        for name in names_of(block.get(field) or (), f"{where}.{field}").exact  # patterns match nothing there
    }
    return Fp8(declaration=Declaration(format=Fp8Block(), scheme=scheme), kept=frozenset(kept))
