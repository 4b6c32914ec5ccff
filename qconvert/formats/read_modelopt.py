"""A ``quantization_config`` of NVIDIA's ModelOpt read."""

from __future__ import annotations

import fnmatch
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from qconvert.core.dtypes import DType
from qconvert.core.errors import SourceError
from qconvert.core.scheme import NVFP4, Activation, Float, Group, PerTensor, ScaleSpec, Scheme
from qconvert.formats.declaration import Declaration, Declared, plain_names_of
from qconvert.formats.fp8_tensor import MODELOPT_FP8
from qconvert.formats.nvfp4_modelopt import Nvfp4ModelOpt

_WHERE = "quantization_config"
_E4M3 = Float(kind="e4m3fn")
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
    "NVFP4": Declaration(
        format=Nvfp4ModelOpt(),
        scheme=replace(NVFP4, activation=Activation(kind="dynamic", grid=Float(kind="e2m1"), group=16)),
    ),
    "W4A16_NVFP4": Declaration(format=Nvfp4ModelOpt(), scheme=NVFP4),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class DeclaredModelOpt:
    """``quant_method: modelopt``: every module but those that a shell-style entry matches, or begins the name of."""

    declaration: Declaration
    kept: frozenset[str]
    complete: bool = False

    def of(self, module: str) -> Declaration | None:
        """See ``Declared.of``."""
        kept = any(fnmatch.fnmatchcase(module, entry) or module.startswith(f"{entry}.") for entry in self.kept)
        return None if kept else self.declaration


def read_modelopt(block: Mapping[str, Any]) -> Declared:
    """What ``quant_algo`` and the list of excluded modules declare, flat or inside ``quantization``.

    Raises:
        SourceError: an algorithm that cannot be read here.
    """
    inner = block.get("quantization", block)
    if not isinstance(inner, Mapping):
        raise SourceError(f"config.json: {_WHERE}.quantization is {inner!r}; expected an object")
    algorithm = inner.get("quant_algo")
    if not isinstance(algorithm, str) or algorithm not in _DECLARED:
        raise SourceError(f"config.json: {_WHERE}.quant_algo is {algorithm!r}; {', '.join(_DECLARED)} can be read")
    declaration = _DECLARED[algorithm]
    size = inner.get("group_size")
    if isinstance(declaration.scheme.blocking, Group) and size not in (None, declaration.scheme.blocking.size):
        raise SourceError(
            f"config.json: {_WHERE}.group_size is {size!r}; {declaration.scheme.blocking.size} can be read"
        )
    entries = inner.get("ignore") or inner.get("exclude_modules") or ()
    return DeclaredModelOpt(declaration=declaration, kept=plain_names_of(entries, f"{_WHERE}.ignore"))
