"""Quantized checkpoint + another loader -> plan: codes move into that loader's format, nothing is rounded."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

import xxhash

from qconvert.arch.names import module_of, name_of
from qconvert.core.dtypes import DType
from qconvert.core.errors import FormatError, SourceError, UsageError
from qconvert.core.plan import Packed, Plan, Reading, Reencode, Slice, Step
from qconvert.core.role import TensorRole
from qconvert.core.scheme import Scheme
from qconvert.formats.awq import Awq
from qconvert.formats.base import Format
from qconvert.formats.engine_rules import ModuleDecision
from qconvert.formats.gptq import Gptq
from qconvert.formats.pack_quantized import PackQuantized
from qconvert.formats.table import FORMATS, METHODS, format_named
from qconvert.io.checkpoint import Checkpoint
from qconvert.plan.decided import Decided, StoredAs, assemble, keep, noted
from qconvert.plan.layout import DEFAULT_SHARD_BYTES
from qconvert.plan.middle_zeros import read_as_symmetric
from qconvert.plan.row_blocks import packed_peak_bytes
from qconvert.plan.source import PlannedSource, look_at

_KEPT = "not quantized in the source"
_MOVED = "the source's codes"


@dataclass(frozen=True, slots=True, kw_only=True)
class Reencoding:
    """What is asked for.

    Attributes:
        method: the loader that shall read the output, as ``quantization_config`` names it.
        allow_scale_rounding: move scales also where the type in which the loader holds them does not hold them all.
    """

    method: str
    allow_scale_rounding: bool = False

    def __post_init__(self) -> None:
        if self.method not in METHODS:
            raise UsageError(f"format {self.method!r} is unknown; expected one of {', '.join(METHODS)}")

    @property
    def entry(self) -> dict[str, Any]:
        """As plain JSON."""
        return {"format": self.method, "allow_scale_rounding": self.allow_scale_rounding}

    @property
    def hash(self) -> str:
        """xxh3-128 of it; that of no policy."""
        return xxhash.xxh3_128_hexdigest(repr(("re-encode", self.method, self.allow_scale_rounding)).encode())


def plan_reencoding(checkpoint: Checkpoint, reencoding: Reencoding, *, shard_bytes: int = DEFAULT_SHARD_BYTES) -> Plan:
    """Decide every tensor of a quantized ``checkpoint``; reads headers, and the zero points of AWQ.

    Raises:
        SourceError: no checkpoint that can be read, or one that is not quantized.
        FormatError: the loader has no format for the codes of a matrix; the message names it and the reason of each.
        PlanError: an engine would not read the output.
    """
    source = look_at(checkpoint, from_quantized=True)
    if not source.quantized:
        raise SourceError(
            f"{checkpoint.path}: not quantized, so there are no codes to move; use `qconvert quantize` instead"
        )
    source = read_as_symmetric(checkpoint, source)
    decided = decide_moves(checkpoint, source, reencoding)
    config = noted(checkpoint.config, source)
    return assemble(checkpoint, source, decided, config=config, decided_by=reencoding.hash, shard_bytes=shard_bytes)


def decide_moves(checkpoint: Checkpoint, source: PlannedSource, reencoding: Reencoding) -> list[Decided]:
    """What becomes of every tensor, without the plan around it.

    Raises:
        FormatError: the loader has no format for the codes of a matrix.
    """
    served = _served_type(checkpoint.config)
    return [_decide(name, role, source, reencoding, served) for name, role in source.census.roles.items()]


def _served_type(config: Mapping[str, Any]) -> DType:
    """The type that engines compute in, and cast scales of integers to when they load."""
    for block in (config, config.get("text_config")):
        for key in ("dtype", "torch_dtype"):
            named = block.get(key) if isinstance(block, Mapping) else None
            for dtype in (DType.BF16, DType.F16, DType.F32):
                if named == str(dtype.torch_dtype).removeprefix("torch."):
                    return dtype
    return DType.BF16


def _decide(name: str, role: TensorRole, source: PlannedSource, reencoding: Reencoding, served: DType) -> Decided:
    reading = source.quantized.get(name)
    if reading is None or reading.packed is None:
        info = source.census.tensors[name]
        whole = Slice(tensor=info.name, begin=0, end=info.numel // info.row_width)
        named = name_of(role, source.census.naming)
        return keep(info, role, whole, info.shape, name=named, reason=_KEPT)
    return _move(module_of(name), role, reading, reading.packed, reencoding, served)


def _move(
    module: str, role: TensorRole, reading: Reading, packed: Packed, reencoding: Reencoding, served: DType
) -> Decided:
    try:
        target = _target(packed, reencoding.method, served)
    except FormatError as error:
        raise FormatError(
            f"{module} is {packed.scheme} in {packed.format}: {reencoding.method} cannot hold these codes: {error}"
        ) from None
    step = Step(
        inputs=reading.inputs,
        role=role,
        action=Reencode(
            reason=_MOVED,
            module=module,
            scheme=target.scheme,
            format=target.format,
            allow_scale_rounding=reencoding.allow_scale_rounding,
        ),
        outputs=tuple(f"{module}.{suffix}" for suffix in target.suffixes),
        peak_bytes=target.peak_bytes,
        packed=packed,
    )
    decision = ModuleDecision(name=module, shape=packed.shape, scheme=target.scheme, format=target.format)
    return Decided(step=step, stored=target.stored, module=decision)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Target:
    """How matrices that are stored alike in the source are stored in the output."""

    scheme: Scheme
    format: str
    suffixes: tuple[str, ...]
    stored: StoredAs
    peak_bytes: int


@lru_cache(maxsize=64)
def _target(packed: Packed, method: str, served: DType) -> _Target:
    """The first format of ``method`` that holds the codes and the blocks as they are.

    Raises:
        FormatError: none does, with the reason of each.
    """
    if packed.scheme.shares_second_scale and packed.scheme.activation.kind != "none":
        raise FormatError("what rounds activations by a stored scale is read only")
    reasons = []
    for form in [known for known in FORMATS if known.quant_method == method]:
        scheme = _with_scales_of(form, packed, served)
        try:
            parts = form.parts(scheme, packed.shape)
        except FormatError as reason:
            reasons.append(str(reason))
            continue
        return _Target(
            scheme=scheme,
            format=form.name,
            suffixes=tuple(part.suffix for part in parts),
            stored=tuple((part.dtype, part.shape) for part in parts),
            peak_bytes=packed_peak_bytes(packed, form.row_block(scheme, packed.shape)),
        )
    raise FormatError("; ".join(reasons))


def _with_scales_of(form: Format, packed: Packed, served: DType) -> Scheme:
    """The source's scheme with scales as ``form`` stores them and its loaders hold them.

    Loaders hold scales of integers with 16-bit activations in the type that the model is served in, all others in
    float32 or as they are stored (vLLM 0.32, transformers 5.23). GPTQ and AWQ store F16. For the loader that reads the
    source nothing changes.
    """
    scheme = packed.scheme
    if form.quant_method == format_named(packed.format).quant_method:
        return scheme
    if form.name == PackQuantized().name:
        return replace(scheme, scale=replace(scheme.scale, dtype=served))
    if form.quant_method in (Gptq().quant_method, Awq().quant_method):
        exact_in = None if served is DType.F16 else served
        return replace(scheme, scale=replace(scheme.scale, dtype=DType.F16, exact_in=exact_in))
    return scheme
