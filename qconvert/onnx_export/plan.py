"""Which weights a package holds and how each is stored: decided from headers, before anything is written."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Any

import xxhash

from qconvert.arch.names import Naming, name_of
from qconvert.arch.shapes import STACKED
from qconvert.core.errors import PlanError, UsageError
from qconvert.core.plan import Cast, Plan, Quantize, Reencode, Step
from qconvert.core.role import Kind, Section, TensorRole
from qconvert.core.scheme import INT8, Scheme, int4
from qconvert.io.checkpoint import Checkpoint
from qconvert.onnx_export.actions import NBITS, Wishes, action_for
from qconvert.onnx_export.joining import runs
from qconvert.onnx_export.operator_sets import operators_for
from qconvert.onnx_export.operators import DEFAULT, Version, version_named
from qconvert.onnx_export.pictures import check_picture_tokens, unused_processors
from qconvert.onnx_export.precision import CPU, DEFAULTS, Precision, precision_named
from qconvert.onnx_export.sources import SourceMatrix, matrices_of
from qconvert.onnx_export.weight import Weight
from qconvert.plan.folding import folded_config
from qconvert.plan.layout import DEFAULT_SHARD_BYTES, OutputTensor, lay_out
from qconvert.plan.policy import Policy
from qconvert.plan.source import PlannedSource, look_at
from reference_model.config import TextConfig

CONTRIB = "contrib"
"""The operators of ONNX Runtime's own."""

EMBEDDINGS: Mapping[str, Scheme] = MappingProxyType({"int4": int4(32), "int8": INT8})
"""Schemes for an embedding. Small groups cost nothing where rows are looked up and not multiplied."""

ACCURACY_LEVELS = (0, 4)
"""Those of MatMulNBits that differ on a CPU."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PackageOptions:
    """What is asked of a package.

    Raises:
        UsageError: operators or an accuracy level that there are not, or files of no size.

    Attributes:
        policy: rounds what is not quantized in the source; ``None`` rounds nothing.
        ops: name of the operators that the graph is written in.
        dequantize: store what no operator reads as codes in float32, instead of refusing it.
        accuracy_level: of products with integer codes, 0 for float32 activations, 4 for 8-bit ones.
        ort_version: the oldest ONNX Runtime that shall run it; what that lacks is refused.
        shard_bytes: largest weight file.
        mtp: export the multi-token-prediction head where the checkpoint has one.
        fold_shared_expert: store the shared expert behind the routed ones, for the operator that runs them all.
        vision: export the vision tower where the checkpoint has one.
        taps: have the decoder give what happens in each layer, see ``states.TAPS``.
        last_logits: score the last token of a prompt alone, which is what generation asks for.
        ep: execution provider that shall run it, as ``--ep`` names it.
        dtype: of what is not in codes, as ``--dtype`` names it; ``None`` for what the provider does best.
        embedding: a name of ``EMBEDDINGS``: what the embedding is rounded to where it is not quantized in the source.
        allow_scale_rounding: round scales of the source that the type does not hold, instead of refusing them.
    """

    policy: Policy | None = None
    ops: str = CONTRIB
    dequantize: bool = False
    accuracy_level: int = 4
    ort_version: Version = DEFAULT
    shard_bytes: int = DEFAULT_SHARD_BYTES
    mtp: bool = True
    fold_shared_expert: bool = False
    vision: bool = True
    taps: bool = False
    last_logits: bool = False
    ep: str = CPU
    dtype: str | None = None
    embedding: str | None = None
    allow_scale_rounding: bool = False

    def __post_init__(self) -> None:
        operators_for(self.ops, self.precision)
        if self.embedding is not None and self.embedding not in EMBEDDINGS:
            raise UsageError(f"an embedding cannot be rounded to {self.embedding!r}; expected {', '.join(EMBEDDINGS)}")
        if self.accuracy_level not in ACCURACY_LEVELS:
            raise UsageError(f"accuracy level {self.accuracy_level} is unknown; expected 0 or 4")
        if self.shard_bytes <= 0:
            raise UsageError(f"weight files of {self.shard_bytes} bytes hold nothing")

    @property
    def precision(self) -> Precision:
        """In which types it stores and computes."""
        return precision_named(self.ep, self.dtype)

    @property
    def wishes(self) -> Wishes:
        """What concerns single weights."""
        return Wishes(
            policy=self.policy,
            embedding=None if self.embedding is None else EMBEDDINGS[self.embedding],
            dequantize=self.dequantize,
            allow_scale_rounding=self.allow_scale_rounding,
            precision=self.precision,
        )

    @property
    def entry(self) -> dict[str, Any]:
        """What a manifest says of it, besides the policy."""
        major, minor = self.ort_version
        return {
            "ops": self.ops,
            "dequantize": self.dequantize,
            "accuracy_level": self.accuracy_level,
            "ort_version": f"{major}.{minor}",
            "shard_bytes": self.shard_bytes,
            "mtp": self.mtp,
            "fold_shared_expert": self.fold_shared_expert,
            "vision": self.vision,
            "taps": self.taps,
            "last_logits": self.last_logits,
            "ep": self.ep,
            "dtype": self.dtype or DEFAULTS[self.ep],
            "embedding": self.embedding or "",
            "allow_scale_rounding": self.allow_scale_rounding,
        }

    @classmethod
    def of_entry(cls, entry: Mapping[str, Any], policy: Policy | None) -> PackageOptions:
        """The inverse of ``entry``.

        Raises:
            UsageError: it is malformed.
        """
        expected = {name: type(value) for name, value in cls().entry.items()}
        if {name: type(value) for name, value in entry.items()} != expected:
            raise UsageError(f"package is {dict(entry)}, expected {', '.join(expected)}")
        told = {"ort_version": version_named(entry["ort_version"]), "embedding": entry["embedding"] or None}
        return cls(policy=policy, **{**entry, **told})


@dataclass(frozen=True, slots=True, kw_only=True)
class PackagePlan:
    """A package, decided.

    Attributes:
        plan: its weights.
        weights: how the graphs find them.
        mtp_layers: of the prediction head that is exported; 0 where none is.
        vision: whether a vision tower is exported.
        left_out: what of the checkpoint is in no graph, one sentence each.
    """

    plan: Plan
    weights: Mapping[TensorRole, Weight]
    mtp_layers: int
    vision: bool
    left_out: tuple[str, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class _Decided:
    step: Step
    weight: Weight
    outputs: tuple[OutputTensor, ...]


def plan_package(checkpoint: Checkpoint, options: PackageOptions) -> PackagePlan:
    """Decide every weight of a package of ``checkpoint``, quantized or not; reads headers only.

    Raises:
        SourceError: another architecture, or tensors missing, unknown or misshapen.
        PlanError: experts of one layer differ, a matrix is quantized as no operator reads it, or the configuration does
            not say which tokens stand for images.
        FormatError: a matrix does not fit the blocks of its scheme.
    """
    source = look_at(checkpoint, from_quantized=True)
    text = source.census.config.text
    fold = options.fold_shared_expert and not text.folded_experts
    sections = _sections(source, options)
    if Section.VISION in sections:
        check_picture_tokens(source.census.config, checkpoint.path)
    decided = [_decide(role, group, options, text) for role, group in matrices_of(source, sections, fold=fold)]
    if options.ops == CONTRIB:
        _refuse_mixed_layers(decided)
    unused = {} if Section.VISION in sections else unused_processors(file.name for file in checkpoint.side_files)
    plan = Plan(
        steps=tuple(one.step for one in decided),
        layout=lay_out(_stored_together(decided), options.shard_bytes),
        source_hash=checkpoint.header_hash,
        policy_hash=_hash(options),
        config=_config(checkpoint.config, fold=fold),
        side_files=tuple(file.name for file in checkpoint.side_files if file.name not in unused),
        left_out=tuple(sorted({**checkpoint.left_out, **unused}.items())),
        source_quantization=source.quantization,
    )
    return PackagePlan(
        plan=plan,
        weights={one.step.role: one.weight for one in decided},
        mtp_layers=source.census.mtp_layers if Section.MTP in sections else 0,
        vision=Section.VISION in sections,
        left_out=tuple(_left_out(source, sections)),
    )


def _sections(source: PlannedSource, options: PackageOptions) -> list[Section]:
    """What becomes graphs."""
    stored = {role.section for role in source.census.roles.values()}
    asked = {Section.MTP: options.mtp, Section.VISION: options.vision}
    return [Section.TEXT, *(section for section, wanted in asked.items() if wanted and section in stored)]


def _stored_together(decided: list[_Decided]) -> Iterator[tuple[OutputTensor, ...]]:
    """What stands side by side: the parts of a weight; of those that graphs read as one, each part of them all."""
    outputs = {one.weight.names: one.outputs for one in decided}
    for run in runs((one.step.role, one.weight) for one in decided):
        yield tuple(part for parts in zip(*(outputs[one.names] for one in run), strict=True) for part in parts)


def _refuse_mixed_layers(decided: list[_Decided]) -> None:
    """Raise ``PlanError`` where the two stacks of a layer are not stored alike: QMoE has one width and one block."""
    stacks = {one.step.role: one.weight for one in decided if one.step.role.kind in STACKED}
    for role, up in stacks.items():
        if role.kind is Kind.EXPERT_GATE_UP:
            down = stacks[replace(role, kind=Kind.EXPERT_DOWN)]
            if (up.bits, up.block_size) != (down.bits, down.block_size):
                raise PlanError(
                    f"{up.names[0]} is {up.scheme or 'float32'}, {down.names[0]} is {down.scheme or 'float32'}: ONNX "
                    "Runtime's operator for experts reads both in one width and one size of blocks. Decide them alike, "
                    "or export with --ops standard"
                )


def _hash(options: PackageOptions) -> str:
    rules = None if options.policy is None else options.policy.hash
    return xxhash.xxh3_128_hexdigest(repr((rules, sorted(options.entry.items()))).encode())


def _config(config: Mapping[str, Any], *, fold: bool) -> dict[str, Any]:
    """The checkpoint's configuration without what describes its own storage."""
    written = {key: value for key, value in config.items() if key != "quantization_config"}
    if isinstance(text := written.get("text_config"), Mapping):
        written["text_config"] = {key: value for key, value in text.items() if key != "quantization_config"}
    return folded_config(written) if fold else written


def _left_out(source: PlannedSource, exported: list[Section]) -> Iterator[str]:
    sections = {role.section for role in source.census.roles.values()}
    if Section.MTP in sections.difference(exported):
        yield "the multi-token-prediction head is not exported, as asked: the package decodes one token at a time"
    if Section.VISION in sections.difference(exported):
        yield "the vision tower is not exported, as asked: the package takes text alone"


def _decide(role: TensorRole, group: list[list[SourceMatrix]], options: PackageOptions, text: TextConfig) -> _Decided:
    """One weight of the graph: ``group`` has one matrix, or of each expert one or two."""
    stacked = role.kind in STACKED
    first = group[0][0]
    name = name_of(role, Naming.TEXT)
    shape = (first.shape[0] * len(group[0]), *first.shape[1:])
    matrices = [one for halves in group for one in halves]
    action = action_for(role, name, matrices, options.wishes)
    for one in matrices:
        one.check_cut(action.scheme if isinstance(action, Quantize | Reencode) else one.scheme, text)
    stack = tuple(tuple(one.matrix for one in halves) for halves in group) if stacked else ()
    inputs = tuple(dict.fromkeys(part for one in matrices for part in one.matrix.inputs))
    leading = (len(group),) if stacked else ()
    if isinstance(action, Cast):
        outputs: tuple[OutputTensor, ...] = (OutputTensor(name=name, dtype=action.dtype, shape=(*leading, *shape)),)
        weight = Weight(names=(name,), shape=(*leading, *shape), dtype=action.dtype)
    else:
        matrix = (shape[0], shape[1])
        outputs = tuple(
            OutputTensor(name=f"{action.module}.{part.suffix}", dtype=part.dtype, shape=(*leading, *part.shape))
            for part in NBITS.parts(action.scheme, matrix)
        )
        weight = Weight(
            names=(action.module,), shape=(*leading, *shape), scheme=action.scheme, dtype=action.scheme.scale.dtype
        )
    step = Step(
        inputs=inputs,
        role=role,
        action=action,
        outputs=tuple(output.name for output in outputs),
        peak_bytes=len(group[0]) * max(one.peak_bytes for one in matrices),
        packed=None if stacked else first.reading.packed,
        stack=stack,
    )
    return _Decided(step=step, weight=weight, outputs=outputs)
