"""A ``quantization_config`` of GPTQ or AWQ read."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from qconvert.core.dtypes import DType
from qconvert.core.errors import SourceError
from qconvert.core.scheme import Blocking, Channel, Group, Int, ScaleSpec, Scheme
from qconvert.formats.awq import Awq
from qconvert.formats.base import Format
from qconvert.formats.declaration import Declaration, Declared, plain_names_of
from qconvert.formats.gptq import GPTQ_V2, Gptq

_WHERE = "quantization_config"
_FORMATS: Mapping[object, Format] = {None: Gptq(), "gptq": Gptq(), "gptq_v2": GPTQ_V2}


@dataclass(frozen=True, slots=True, kw_only=True)
class DeclaredGptq:
    """``quant_method: gptq``: one scheme, and what ``dynamic`` excludes (``None``) or overrides.

    Patterns match from the start of a name; the first that does decides (GPTQModel 7.7, vLLM 0.32).
    """

    declaration: Declaration
    dynamic: tuple[tuple[re.Pattern[str], Declaration | None], ...]
    complete: bool = False

    def of(self, module: str) -> Declaration | None:
        """See ``Declared.of``."""
        for pattern, declaration in self.dynamic:
            if pattern.match(module):
                return declaration
        return self.declaration


@dataclass(frozen=True, slots=True, kw_only=True)
class DeclaredAwq:
    """``quant_method: awq``: every module whose name holds none of the entries."""

    declaration: Declaration
    kept: frozenset[str]
    complete: bool = False

    def of(self, module: str) -> Declaration | None:
        """See ``Declared.of``."""
        return None if any(entry in module for entry in self.kept) else self.declaration


def read_gptq(block: Mapping[str, Any]) -> Declared:
    """What ``bits``, ``group_size``, ``sym`` and ``dynamic`` declare, in either version of the layout.

    Raises:
        SourceError: an argument that cannot be read here; the message names it.
    """
    about = block.get("meta")
    version = block.get("checkpoint_format") or (about.get("checkpoint_format") if isinstance(about, Mapping) else None)
    if not isinstance(version, str | None) or version not in _FORMATS:
        raise SourceError(f"config.json: {_WHERE}.checkpoint_format is {version!r}; gptq and gptq_v2 can be read")
    rules = block.get("dynamic") or {}
    if not isinstance(rules, Mapping):
        raise SourceError(f"config.json: {_WHERE}.dynamic is {rules!r}; expected an object")
    declaration = Declaration(
        format=_FORMATS[version], scheme=integer_scheme(block, _WHERE, symmetric=block.get("sym", True))
    )
    dynamic = []
    for entry, overrides in rules.items():
        where = f"{_WHERE}.dynamic[{entry!r}]"
        if not isinstance(overrides, Mapping):
            raise SourceError(f"config.json: {where} is {overrides!r}; expected an object")
        sign, pattern = (entry[:2], entry[2:]) if entry[:2] in ("-:", "+:") else ("+:", entry)
        try:
            compiled = re.compile(pattern)
        except re.error as error:
            raise SourceError(f"config.json: {where} is a broken pattern: {error}") from None
        merged = {**block, **overrides}
        scheme = integer_scheme(merged, where, symmetric=merged.get("sym", True))
        dynamic.append((compiled, None if sign == "-:" else replace(declaration, scheme=scheme)))
    return DeclaredGptq(declaration=declaration, dynamic=tuple(dynamic))


def read_awq(block: Mapping[str, Any]) -> Declared:
    """What ``bits``, ``group_size`` and ``modules_to_not_convert`` declare.

    Raises:
        SourceError: an argument that cannot be read here; the message names it.
    """
    version = block.get("version", "gemm")
    if not isinstance(version, str) or version.lower() != "gemm":
        raise SourceError(f"config.json: {_WHERE}.version is {version!r}; gemm can be read")
    arguments = {"bits": block.get("w_bit", block.get("bits")), "group_size": block.get("q_group_size", -1), **block}
    if block.get("zero_point", True) is not True:
        raise SourceError(f"config.json: {_WHERE}.zero_point is {block['zero_point']!r}; true can be read")
    kept = plain_names_of(block.get("modules_to_not_convert") or (), f"{_WHERE}.modules_to_not_convert")
    declaration = Declaration(format=Awq(), scheme=integer_scheme(arguments, _WHERE, symmetric=False, widths=(4,)))
    return DeclaredAwq(declaration=declaration, kept=kept)


def integer_scheme(
    arguments: Mapping[str, Any], where: str, *, symmetric: object, widths: tuple[int, ...] = (4, 8)
) -> Scheme:
    """What ``bits``, ``group_size`` and ``symmetric`` mean where scales are F16; ``where`` begins an error's message.

    Raises:
        SourceError: one of them cannot be read.
    """
    bits = arguments.get("bits")
    if type(bits) is not int or bits not in widths:
        raise SourceError(f"config.json: {where} has {bits!r} bits; {' and '.join(map(str, widths))} can be read")
    if not isinstance(symmetric, bool):
        raise SourceError(f"config.json: {where}.sym is {symmetric!r}; expected true or false")
    return Scheme(
        grid=Int(bits=bits),
        blocking=_blocking(arguments.get("group_size"), where),
        symmetric=symmetric,
        scale=ScaleSpec(dtype=DType.F16),
    )


def _blocking(size: object, where: str) -> Blocking:
    match size:
        case bool():
            pass
        case -1:
            return Channel()
        case int() if size > 0:
            return Group(size=size)
    raise SourceError(f"config.json: {where}.group_size is {size!r}; expected -1 or a positive number")
