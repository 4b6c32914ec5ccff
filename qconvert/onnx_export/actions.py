"""What becomes of the matrices that one operator reads: cast, rounded, or moved code for code."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from qconvert.arch.names import module_of
from qconvert.arch.shapes import STACKED, is_linear_weight
from qconvert.core.dtypes import DType
from qconvert.core.errors import FormatError, PlanError
from qconvert.core.plan import Cast, Formula, Quantize, Reencode
from qconvert.core.role import Kind, Section, TensorRole
from qconvert.core.scheme import Channel, Group, Int, Scheme
from qconvert.formats.matmul_nbits import MatMulNBits
from qconvert.onnx_export.precision import CUDA, Precision
from qconvert.onnx_export.sources import SourceMatrix
from qconvert.plan.decided import refuse_by_nature
from qconvert.plan.policy import Policy, Rule

NBITS = MatMulNBits()

OFFSET_NORMS = frozenset(
    {
        Kind.NORM,
        Kind.INPUT_NORM,
        Kind.POST_ATTENTION_NORM,
        Kind.ATTENTION_QUERY_NORM,
        Kind.ATTENTION_KEY_NORM,
        Kind.MTP_EMBEDDING_NORM,
        Kind.MTP_HIDDEN_NORM,
    }
)
"""Norms whose weights are stored as offsets from 1."""

STORED_ALIKE = (
    "; a shared expert that is folded must be stored like the routed ones: `qconvert quantize --preset fusable`"
)
DECIDED_ALIKE = "; a shared expert that is folded must be decided like the routed ones: --preset fusable"

CUDA_TILE = 64
"""Inputs that the CUDA provider's kernel for experts in codes takes at a time."""

CUDA_ZERO_POINT_BLOCK = 32
"""The smallest block that may have a zero point there."""

GROUPS = (128, 64, 32, 16)
"""Blocks that a row with one scale is cut into, for operators that know no such rows."""


TABLE = TensorRole(section=Section.TEXT, kind=Kind.EMBEDDING)
"""The embedding: operators look rows up in codes too, and multiply with them where embedding and head are tied."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Wishes:
    """What is asked of all weights; see ``PackageOptions``."""

    policy: Policy | None
    embedding: Scheme | None
    dequantize: bool
    allow_scale_rounding: bool
    precision: Precision


def action_for(role: TensorRole, name: str, matrices: list[SourceMatrix], wishes: Wishes) -> Cast | Quantize | Reencode:
    """What becomes of matrices that one operator reads.

    Raises:
        PlanError: they differ, or are quantized as no operator reads them.
        FormatError: a matrix does not fit the blocks of its scheme.
    """
    dtype = wishes.precision.dtype
    if wishes.policy is not None and not is_linear_weight(role):
        refuse_by_nature(wishes.policy.decide(role), role, name)
    if not is_linear_weight(role) and role != TABLE:
        formula = Formula.SAME
        if role.kind in OFFSET_NORMS:
            formula = Formula.ONE_PLUS
        elif role.kind is Kind.LINEAR_A_LOG:
            formula = Formula.MINUS_EXP
        return Cast(reason="no matrix with codes", name=name, dtype=DType.F32, formula=formula)
    folded = any(one.share is not None for one in matrices)
    stored = _one_of(
        {one.scheme for one in matrices},
        name,
        "are quantized in different ways in the source",
        STORED_ALIKE if folded else "",
    )
    if role.section is Section.VISION:
        if stored is not None and not wishes.dequantize:
            raise PlanError(
                f"{name} is {stored} in the source, and the vision tower of a package is in float32: --dequantize "
                "stores it so, --no-vision leaves the tower out"
            )
        return Cast(reason="the vision tower stays in full precision", name=name, dtype=DType.F32)
    if stored is not None:
        try:
            scheme = held_scheme(stored, matrices[0].shape[-1], wishes.precision, stacked=role.kind in STACKED)
        except FormatError as reason:
            if not wishes.dequantize:
                raise PlanError(
                    f"{name} is {stored} in the source, which no operator of ONNX Runtime's "
                    f"{wishes.precision.ep.upper()} provider reads: {reason}. --dequantize stores it in {dtype}"
                ) from None
            return Cast(reason=f"{stored} in the source, which no operator reads", name=name, dtype=dtype)
        rounded = stored.activation.kind != "none"
        why = "codes of the source" + ("; its rounding of activations is the operator's" if rounded else "")
        return Reencode(
            reason=why,
            module=module_of(name),
            scheme=scheme,
            format=NBITS.name,
            allow_scale_rounding=wishes.allow_scale_rounding,
        )
    if role == TABLE:
        if wishes.embedding is None:
            return Cast(reason="a table that is looked up; --embedding rounds it", name=name, dtype=dtype)
        rule = Rule(match=role.path, scheme=wishes.embedding, reason="--embedding")
        return _rounded(rule, role, name, matrices, wishes.precision)
    if wishes.policy is None:
        return Cast(reason="not quantized in the source", name=name, dtype=dtype)
    rules = [wishes.policy.decide(one.role) for one in matrices]
    _one_of(
        {(rule.scheme, rule.search) for rule in rules},
        name,
        "are decided in different ways",
        DECIDED_ALIKE if folded else "",
    )
    return _rounded(rules[0], role, name, matrices, wishes.precision)


def _rounded(
    rule: Rule, role: TensorRole, name: str, matrices: list[SourceMatrix], precision: Precision
) -> Cast | Quantize:
    """What ``rule`` makes of matrices that are not quantized."""
    if rule.scheme is None:
        return Cast(reason=rule.reason, name=name, dtype=precision.dtype)
    try:
        scheme = held_scheme(rule.scheme, matrices[0].shape[-1], precision, stacked=role.kind in STACKED)
        for shape in {(one.rows_and_cols[0], one.rounded_cols) for one in matrices}:
            NBITS.check(scheme, shape)
    except FormatError as reason:
        raise FormatError(f"{name} cannot be stored as {rule.scheme}: {reason}; keep it, or choose another") from None
    return Quantize(reason=rule.reason, module=module_of(name), scheme=scheme, format=NBITS.name, search=rule.search)


def _one_of(found: set[Any], name: str, problem: str, remedy: str) -> Any:
    if len(found) > 1:
        kinds = ", ".join(sorted(str(one[0] if isinstance(one, tuple) else one) for one in found))
        raise PlanError(f"the matrices of {name} {problem}: {kinds}; one operator reads them all in one way{remedy}")
    return next(iter(found))


def held_scheme(scheme: Scheme, cols: int, precision: Precision, *, stacked: bool) -> Scheme:
    """``scheme`` as the operators hold it: scales of their type, and of single matrices none for a whole row.

    A row's one scale is repeated for each of its blocks, which changes no number.

    Raises:
        FormatError: no operator holds these codes.
    """
    held = replace(scheme.weight_only(), scale=replace(scheme.scale, dtype=precision.scales, exact_in=None))
    if (
        isinstance(scheme.grid, Int)
        and isinstance(scheme.blocking, Channel)
        and not (stacked and scheme.grid.bits == 8 and _rows_are_read(scheme, precision))
    ):
        sizes = [size for size in GROUPS if not cols % size]
        if not sizes:
            raise FormatError(f"no block of 16 or more inputs divides {cols} columns")
        held = replace(held, blocking=Group(size=sizes[0]))
    NBITS.check_scheme(held)
    if stacked and precision.ep == CUDA:
        _check_cuda_experts(held, cols)
    return held


def _rows_are_read(scheme: Scheme, precision: Precision) -> bool:
    """Whether QMoE takes one scale a row; the CUDA provider does without zero points only."""
    return precision.ep != CUDA or scheme.symmetric


def _check_cuda_experts(scheme: Scheme, cols: int) -> None:
    """Refuse experts that the CUDA provider's QMoE does not take. Read in ONNX Runtime 1.31.1, not run.

    Raises:
        FormatError: says what it wants.
    """
    if cols % CUDA_TILE:
        raise FormatError(f"its QMoE takes codes of a multiple of {CUDA_TILE} inputs, not of {cols}")
    block = scheme.blocking.size if isinstance(scheme.blocking, Group) else 0
    if not scheme.symmetric and block < CUDA_ZERO_POINT_BLOCK:
        raise FormatError(f"its QMoE takes zero points of blocks of {CUDA_ZERO_POINT_BLOCK} or more, not of {block}")
