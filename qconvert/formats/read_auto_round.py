"""A ``quantization_config`` of AutoRound read."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from qconvert.core.errors import SourceError
from qconvert.formats.awq import Awq
from qconvert.formats.base import Format
from qconvert.formats.declaration import Declaration, Declared
from qconvert.formats.gptq import AUTO_ROUND, AUTO_ROUND_GPTQ, GPTQ_V2, Gptq
from qconvert.formats.read_gptq import integer_scheme

_WHERE = "quantization_config"
_AWQ = "auto_round:auto_awq"
_PACKINGS: Mapping[str, tuple[Format, ...]] = {
    "auto_round:auto_gptq": (AUTO_ROUND_GPTQ, Gptq()),
    "auto_round:gptqmodel": (GPTQ_V2, AUTO_ROUND),
    "auto_round": (AUTO_ROUND, GPTQ_V2),
    _AWQ: (Awq(),),
}
"""What ``packing_format`` stands for, now and in earlier releases."""

_UNQUANTIZED_BITS = 16
_ROTATIONS = ("rotation_config", "spinquant_config")
_SPECIAL = re.compile(r"[*+?^$()\[\]{}|\\]")


@dataclass(frozen=True, slots=True, kw_only=True)
class DeclaredAutoRound:
    """``quant_method: auto-round``: one scheme, and what ``extra_config`` says otherwise.

    A full name decides first, then the first pattern that is found anywhere in a name (AutoRound 0.16, vLLM 0.32). The
    blocks that a configuration lists are not asked: which modules are quantized shows in what is stored, and AutoRound
    0.16 quantizes ``mtp.fc``, which is in none of its blocks.

    Attributes:
        exact: name -> what is said of it; ``None`` for what stays.
        patterns: the same by pattern.
    """

    declaration: Declaration
    exact: Mapping[str, Declaration | None]
    patterns: tuple[tuple[re.Pattern[str], Declaration | None], ...]
    complete: bool = False

    def of(self, module: str) -> Declaration | None:
        """See ``Declared.of``."""
        if module in self.exact:
            return self.exact[module]
        found = (declaration for pattern, declaration in self.patterns if pattern.search(module))
        return next(found, self.declaration)


def read_auto_round(block: Mapping[str, Any]) -> Declared:
    """What ``bits``, ``group_size``, ``sym``, ``packing_format`` and ``extra_config`` declare.

    Raises:
        SourceError: another kind of numbers, rotated weights, or an argument that cannot be read here; the message
            names it.
    """
    packing = block.get("packing_format", "auto_round:auto_gptq")
    if not isinstance(packing, str) or packing not in _PACKINGS:
        raise SourceError(f"config.json: {_WHERE}.packing_format is {packing!r}; {', '.join(_PACKINGS)} can be read")
    rotated = next((name for name in _ROTATIONS if block.get(name)), None)
    if rotated is not None:
        raise SourceError(f"config.json: {_WHERE} has a {rotated}: rotated weights cannot be read")
    extra = block.get("extra_config") or {}
    if not isinstance(extra, Mapping):
        raise SourceError(f"config.json: {_WHERE}.extra_config is {extra!r}; expected an object")
    declaration = _declaration(block, packing, _WHERE)
    if declaration is None:
        raise SourceError(f"config.json: {_WHERE} has {_UNQUANTIZED_BITS} bits; 4 and 8 can be read")
    exact: dict[str, Declaration | None] = {}
    patterns = []
    for name, overrides in extra.items():
        where = f"{_WHERE}.extra_config[{name!r}]"
        if not isinstance(overrides, Mapping):
            raise SourceError(f"config.json: {where} is {overrides!r}; expected an object")
        given = {key: value for key, value in overrides.items() if value is not None}
        exact[name] = said = _declaration({**block, **given}, packing, where)
        if _SPECIAL.search(name):
            patterns.append((_compiled(name, where), said))
    return DeclaredAutoRound(declaration=declaration, exact=exact, patterns=tuple(patterns))


def _declaration(arguments: Mapping[str, Any], packing: str, where: str) -> Declaration | None:
    """What is said of modules with these arguments; ``None`` for those that stay."""
    if arguments.get("bits") == _UNQUANTIZED_BITS:
        return None
    kind, inputs = arguments.get("data_type", "int"), arguments.get("act_bits")
    if kind != "int":
        raise SourceError(f"config.json: {where}.data_type is {kind!r}; int can be read")
    if inputs is not None and (type(inputs) is not int or inputs < _UNQUANTIZED_BITS):
        raise SourceError(f"config.json: {where}.act_bits is {inputs!r}; activations of 16 bits can be read")
    widths = (4,) if packing == _AWQ else (4, 8)
    scheme = integer_scheme(arguments, where, symmetric=arguments.get("sym", True), widths=widths)
    form, *otherwise = _PACKINGS[packing]
    return Declaration(format=form, scheme=scheme, otherwise=tuple(otherwise))


def _compiled(pattern: str, where: str) -> re.Pattern[str]:
    try:
        return re.compile(pattern)
    except re.error as error:
        raise SourceError(f"config.json: {where} is a broken pattern: {error}") from None
