"""What a conversion starts from: every tensor that the architecture asks for, and how the quantized ones are stored."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

from qconvert.arch.census import Census, check
from qconvert.arch.families import quant_method, read_config, reject_quantized
from qconvert.arch.names import name_of
from qconvert.core.dtypes import DType
from qconvert.core.errors import SourceError
from qconvert.core.plan import Packed, Reading
from qconvert.core.scheme import Scheme
from qconvert.core.tensor_info import TensorInfo
from qconvert.io.checkpoint import Checkpoint
from qconvert.quantized_view import QuantizedView, Stored, view

_SHOWN = 20
_CACHE_SCALE = "a scale of cached keys and values: outputs declare nothing of the cache"


@dataclass(frozen=True, slots=True, kw_only=True)
class PlannedSource:
    """A checkpoint that can be converted.

    Attributes:
        census: all tensors; a quantized matrix as the BF16 tensor that it stands for, which lies nowhere.
        quantized: what is read for each of these, by that tensor's name.
        quantization: for ``Plan.source_quantization``.
        left_out: (name, reason) of the tensors that no output has.
    """

    census: Census
    quantized: Mapping[str, Reading] = field(default_factory=dict)
    quantization: Mapping[str, Any] | None = None
    left_out: tuple[tuple[str, str], ...] = ()


def look_at(checkpoint: Checkpoint, *, from_quantized: bool) -> PlannedSource:
    """Find every tensor of ``checkpoint``; reads headers only.

    Raises:
        SourceError: another architecture, tensors missing, unknown or misshapen; quantized already without
            ``from_quantized``, or in a way that contradicts itself.
    """
    method = quant_method(checkpoint.config)
    if method is None or not from_quantized:
        reject_quantized(checkpoint.config, checkpoint.path, checkpoint.tensors)
        return PlannedSource(census=_census(checkpoint, checkpoint.tensors))
    found = view(checkpoint)
    if found.problems:
        listed = "\n  ".join(str(problem) for problem in found.problems[:_SHOWN])
        more = len(found.problems) - _SHOWN
        raise SourceError(
            f"{checkpoint.path}: {len(found.problems)} tensors contradict config.json:\n  {listed}"
            + (f"\n  ... and {more} more" if more > 0 else "")
        )
    quantized = {
        name_of(stored.role, found.naming): _reading(checkpoint, stored)
        for stored in found.stored.values()
        if stored.plain is None
    }
    return PlannedSource(
        census=_census(checkpoint, _meant(checkpoint, quantized, found.cache_scales)),
        quantized=quantized,
        quantization={"quant_method": method, "matrices": _counts(found)},
        left_out=tuple((name, _CACHE_SCALE) for name in found.cache_scales),
    )


def _census(checkpoint: Checkpoint, tensors: Mapping[str, TensorInfo]) -> Census:
    config = read_config(checkpoint.config, checkpoint.path)
    try:
        return check(tensors, config)
    except SourceError as error:
        raise SourceError(f"{checkpoint.path}: {error}") from None


def _meant(checkpoint: Checkpoint, quantized: Mapping[str, Reading], left_out: Iterable[str]) -> dict[str, TensorInfo]:
    gone = {part.tensor for reading in quantized.values() for part in reading.inputs}.union(left_out)
    meant = {name: info for name, info in checkpoint.tensors.items() if name not in gone}
    for name, reading in quantized.items():
        if reading.packed is not None:
            shard = checkpoint.tensors[reading.inputs[0].tensor].shard
            shape = reading.packed.shape
            meant[name] = TensorInfo(name=name, dtype=DType.BF16, shape=shape, shard=shard, begin=0, end=0)
    return meant


def _reading(checkpoint: Checkpoint, stored: Stored) -> Reading:
    if stored.format is None or stored.scheme is None:
        raise SourceError(f"{checkpoint.path}: {stored.name} is neither plain nor quantized")
    rows, cols = stored.shape
    return Reading(inputs=tuple(stored.parts.values()), packed=_packed(stored.format.name, stored.scheme, (rows, cols)))


@lru_cache(maxsize=64)
def _packed(format_name: str, scheme: Scheme, shape: tuple[int, int]) -> Packed:
    """One for all matrices of a shape: a large checkpoint has some 92,000 of them."""
    return Packed(format=format_name, scheme=scheme, shape=shape)


def _counts(found: QuantizedView) -> list[dict[str, Any]]:
    """How many matrices there are of each scheme and format, most first."""
    counts = Counter(
        (str(stored.scheme), stored.format.name) for stored in found.stored.values() if stored.format is not None
    )
    return [
        {"scheme": scheme, "format": name, "count": count}
        for (scheme, name), count in sorted(counts.items(), key=lambda pair: (-pair[1], pair[0]))
    ]
