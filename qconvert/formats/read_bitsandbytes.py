"""A ``quantization_config`` of bitsandbytes read."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from qconvert.core.errors import SourceError
from qconvert.core.scheme import LLM_INT8, bnb4
from qconvert.formats.bitsandbytes_state import Bitsandbytes4, Bitsandbytes8
from qconvert.formats.declaration import Declaration, Declared

_WHERE = "quantization_config"


@dataclass(frozen=True, slots=True, kw_only=True)
class DeclaredBitsandbytes:
    """``quant_method: bitsandbytes``: whichever linear module is stored in it."""

    declaration: Declaration
    complete: bool = False

    def of(self, module: str) -> Declaration | None:
        """See ``Declared.of``."""
        return self.declaration


def read_bitsandbytes(block: Mapping[str, Any]) -> Declared:
    """What ``load_in_4bit``, ``load_in_8bit`` and ``bnb_4bit_quant_type`` declare.

    Raises:
        SourceError: neither width, another codebook, or scales that are quantized a second time.
    """
    if block.get("load_in_8bit") is True and block.get("load_in_4bit") is True:
        raise SourceError(f"config.json: {_WHERE} says both load_in_4bit and load_in_8bit")
    if block.get("load_in_8bit") is True:
        return DeclaredBitsandbytes(declaration=Declaration(format=Bitsandbytes8(), scheme=LLM_INT8))
    if block.get("load_in_4bit") is not True:
        raise SourceError(f"config.json: {_WHERE} says neither load_in_4bit nor load_in_8bit")
    if block.get("bnb_4bit_use_double_quant"):
        raise SourceError(f"config.json: {_WHERE}.bnb_4bit_use_double_quant is set: scales in 8 bits cannot be read")
    codebook = block.get("bnb_4bit_quant_type", "fp4")
    match codebook:
        case "nf4" | "fp4":
            return DeclaredBitsandbytes(declaration=Declaration(format=Bitsandbytes4(codebook), scheme=bnb4(codebook)))
    raise SourceError(f"config.json: {_WHERE}.bnb_4bit_quant_type is {codebook!r}; nf4 and fp4 can be read")
