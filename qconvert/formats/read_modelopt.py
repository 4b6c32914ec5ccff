"""A ``quantization_config`` of NVIDIA's ModelOpt read."""

from __future__ import annotations

import fnmatch
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from qconvert.core.dtypes import DType
from qconvert.core.errors import SourceError
from qconvert.core.scheme import FP8, FP8_BLOCK, NVFP4, Activation, Float, Group, PerTensor, ScaleSpec, Scheme
from qconvert.formats.declaration import Declaration, Declared, plain_names_of
from qconvert.formats.fp8_modelopt import MODELOPT_FLAT_TILES, MODELOPT_ROWS, MODELOPT_TILES
from qconvert.formats.fp8_tensor import MODELOPT_FP8
from qconvert.formats.nvfp4_modelopt import Nvfp4ModelOpt

_WHERE = "quantization_config"
_E4M3 = Float(kind="e4m3fn")
_TILES = Declaration(format=MODELOPT_TILES, scheme=FP8_BLOCK, otherwise=(MODELOPT_FLAT_TILES,))
_DECLARED: Mapping[str, Declaration] = {
    "FP8": Declaration(
        format=MODELOPT_FP8,
        scheme=Scheme(
            grid=_E4M3,
            blocking=PerTensor(),
            scale=ScaleSpec(dtype=DType.F32),
            activation=Activation(kind="static", grid=_E4M3),
        ),
    ),
    "FP8_PER_CHANNEL_PER_TOKEN": Declaration(format=MODELOPT_ROWS, scheme=FP8),
    "FP8_PB_WO": _TILES,
    "FP8_PB_REAL": _TILES,
    "NVFP4": Declaration(
        format=Nvfp4ModelOpt(),
        scheme=replace(NVFP4, activation=Activation(kind="dynamic", grid=Float(kind="e2m1"), group=16)),
    ),
    "W4A16_NVFP4": Declaration(format=Nvfp4ModelOpt(), scheme=NVFP4),
    "NVFP4_W4A16": Declaration(format=Nvfp4ModelOpt(), scheme=NVFP4),
}
_MIXED = "MIXED_PRECISION"
_PLAIN = (None, "UNQUANTIZED", "NONE")


@dataclass(frozen=True, slots=True, kw_only=True)
class DeclaredModelOpt:
    """``quant_method: modelopt``: every module but those that a shell-style entry matches, or begins the name of."""

    declaration: Declaration
    kept: frozenset[str]
    complete: bool = False

    def of(self, module: str) -> Declaration | None:
        """See ``Declared.of``."""
        return None if _is_kept(module, self.kept) else self.declaration


@dataclass(frozen=True, slots=True, kw_only=True)
class DeclaredMixed:
    """``quant_algo: MIXED_PRECISION``: the modules that are listed, each by its name or that of a module around it.

    The longest name decides, and what is excluded stays even so (ModelOpt 0.47, vLLM 0.32).
    """

    layers: Mapping[str, Declaration | None]
    kept: frozenset[str]
    complete: bool = False

    def of(self, module: str) -> Declaration | None:
        """See ``Declared.of``."""
        if _is_kept(module, self.kept):
            return None
        steps = module.split(".")
        around = (".".join(steps[:count]) for count in range(len(steps), 0, -1))
        return next((self.layers[name] for name in around if name in self.layers), None)


def _is_kept(module: str, entries: frozenset[str]) -> bool:
    return any(fnmatch.fnmatchcase(module, entry) or module.startswith(f"{entry}.") for entry in entries)


def read_modelopt(block: Mapping[str, Any]) -> Declared:
    """What ``quant_algo``, ``quantized_layers`` and the list of excluded modules declare, flat or in ``quantization``.

    Raises:
        SourceError: an algorithm that cannot be read here.
    """
    inner = block.get("quantization", block)
    if not isinstance(inner, Mapping):
        raise SourceError(f"config.json: {_WHERE}.quantization is {inner!r}; expected an object")
    entries = inner.get("ignore") or inner.get("exclude_modules") or ()
    kept = plain_names_of(entries, f"{_WHERE}.ignore")
    if inner.get("quant_algo") != _MIXED:
        return DeclaredModelOpt(declaration=_declaration(inner, _WHERE), kept=kept)
    layers = inner.get("quantized_layers")
    if not isinstance(layers, Mapping):
        raise SourceError(f"config.json: {_WHERE}.quantized_layers is {layers!r}; expected an object")
    return DeclaredMixed(layers={name: _layer(name, said) for name, said in layers.items()}, kept=kept)


def _layer(name: str, said: object) -> Declaration | None:
    where = f"{_WHERE}.quantized_layers[{name!r}]"
    if not isinstance(said, Mapping):
        raise SourceError(f"config.json: {where} is {said!r}; expected an object")
    return None if said.get("quant_algo") in _PLAIN else _declaration(said, where)


def _declaration(said: Mapping[str, Any], where: str) -> Declaration:
    algorithm = said.get("quant_algo")
    name = algorithm.upper() if isinstance(algorithm, str) else ""  # ModelOpt writes some in small letters
    if name not in _DECLARED:
        known = (*_DECLARED, _MIXED) if where == _WHERE else tuple(_DECLARED)
        raise SourceError(f"config.json: {where}.quant_algo is {algorithm!r}; {', '.join(known)} can be read")
    declaration, size = _DECLARED[name], said.get("group_size")
    if isinstance(declaration.scheme.blocking, Group) and size not in (None, declaration.scheme.blocking.size):
        raise SourceError(
            f"config.json: {where}.group_size is {size!r}; {declaration.scheme.blocking.size} can be read"
        )
    return declaration
