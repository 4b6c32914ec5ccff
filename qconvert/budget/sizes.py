"""What a part takes in a file, in each scheme: the bytes of its tensors, and what they take of the file's header."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from math import prod

from qconvert.arch.names import module_of, name_of
from qconvert.budget.parts import SCHEMES, Part
from qconvert.core.plan import Plan
from qconvert.core.scheme import Scheme
from qconvert.formats.base import PartSpec
from qconvert.formats.table import format_for
from qconvert.weights.source import CheckpointWeights

_OFFSETS = 22
"""Digits of both offsets of a tensor in a file of some gigabytes, where it is in the file's header."""

_LAYER = 3
"""Digits of a layer that names are taken to have: the same part weighs the same in every layer."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Size:
    """Bytes of tensors, and about those of their entries in headers: what digits offsets have, only a plan knows."""

    tensors: int
    header: int

    @property
    def both(self) -> int:
        """Of the files."""
        return self.tensors + self.header


def size_of(source: CheckpointWeights, part: Part, scheme: str | None) -> Size:
    """What ``part`` takes in the scheme of that name, or where it stays: BF16 if it is quantized in the source."""
    tensors = header = 0
    seen: set[str] = set()
    for role in part.roles:
        stored = source.stored[role]
        name = name_of(role, source.view.naming)
        if scheme is None:
            tensors += source.stored_bytes(role) if stored.plain is not None else 2 * prod(stored.shape)
            name = name if stored.plain is None else stored.plain.tensor
            if name not in seen:
                seen.add(name)
                header += _entry(name, part.layer, "BF16", stored.shape)
        else:
            some, entries = _rounded(SCHEMES[scheme], module_of(name), part.layer, (stored.shape[0], stored.shape[1]))
            tensors += some
            header += entries
    return Size(tensors=tensors, header=header)


def _rounded(scheme: Scheme, module: str, layer: int, shape: tuple[int, int]) -> tuple[int, int]:
    parts = _parts(scheme, shape)
    tensors = sum(prod(part.shape) * part.dtype.itemsize for part in parts)
    return tensors, sum(_entry(f"{module}.{part.suffix}", layer, part.dtype.value, part.shape) for part in parts)


@lru_cache(maxsize=64)
def _parts(scheme: Scheme, shape: tuple[int, int]) -> tuple[PartSpec, ...]:
    return format_for(scheme).parts(scheme, shape)


def _entry(name: str, layer: int, dtype: str, shape: tuple[int, ...]) -> int:
    listed = ",".join(map(str, shape))
    text = f'"{name}":{{"dtype":"{dtype}","shape":[{listed}],"data_offsets":[,]}},'
    return len(text) - len(str(layer)) + _LAYER + _OFFSETS


def file_bytes(plan: Plan) -> int:
    """What the files with weights that ``plan`` writes take together, headers and all."""
    return sum(max(info.end for info in infos) for infos in plan.layout.by_file().values())
