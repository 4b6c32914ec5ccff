"""Checkpoint and policy -> plan: every tensor decided, every output byte placed, every rule of the engines checked."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from math import prod

from qconvert.arch.names import Naming, module_of, name_of
from qconvert.arch.shapes import STACKED
from qconvert.core.dtypes import DType
from qconvert.core.errors import FormatError, PlanError
from qconvert.core.plan import Dequantize, Folding, Packed, Plan, Quantize, Reading, Slice, Step
from qconvert.core.role import TensorRole
from qconvert.core.scheme import Scheme
from qconvert.core.tensor_info import TensorInfo
from qconvert.formats.engine_rules import ModuleDecision
from qconvert.formats.table import format_for
from qconvert.io.checkpoint import Checkpoint
from qconvert.plan.decided import Decided, StoredAs, assemble, for_engine, keep, kept_module, noted, refuse_by_nature
from qconvert.plan.folding import fold_shared_experts, folded_config, folding_hash
from qconvert.plan.halves import decide
from qconvert.plan.layout import DEFAULT_SHARD_BYTES
from qconvert.plan.policy import Policy, Rule
from qconvert.plan.row_blocks import packed_peak_bytes, peak_bytes
from qconvert.plan.source import look_at
from qconvert.transform.experts import unstack


@dataclass(frozen=True, slots=True, kw_only=True)
class _Matrix:
    """A tensor, or one expert's part of a stacked one, before it is decided."""

    info: TensorInfo
    role: TensorRole
    part: Slice
    rule: Rule
    reading: Reading | None = None
    """What gives it where it is quantized in the source."""

    @property
    def inputs(self) -> tuple[Slice, ...]:
        return (self.part,) if self.reading is None else self.reading.inputs

    @property
    def packed(self) -> Packed | None:
        return None if self.reading is None else self.reading.packed

    @property
    def shape(self) -> tuple[int, ...]:
        rows = self.part.end - self.part.begin
        whole = rows * self.info.row_width == self.info.numel
        return self.info.shape if whole else (rows, self.info.row_width)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Storage:
    """How matrices of one scheme and shape are stored. They share it: a large checkpoint has some 92,000 of them."""

    shape: tuple[int, int]
    format: str
    suffixes: tuple[str, ...]
    stored: StoredAs
    peak_bytes: int


def build_plan(
    checkpoint: Checkpoint,
    policy: Policy,
    *,
    shard_bytes: int = DEFAULT_SHARD_BYTES,
    from_quantized: bool = False,
    fold: bool = False,
) -> Plan:
    """Decide every tensor of ``checkpoint`` and place every byte of the output; reads headers only.

    Stacked experts are split where any of them is quantized, and stay stacked otherwise. Steps and outputs come in
    the order of names, numbers in them by value and experts of one projection together: how the source is cut into
    files changes nothing.

    With ``from_quantized`` the checkpoint may be quantized: its matrices are dequantized and rounded anew, and those
    that the policy keeps become BF16. With ``fold`` the shared expert is rounded and then stored as routed ones.

    Raises:
        SourceError: another architecture, tensors missing, unknown or misshapen, or quantized already.
        PlanError: a rule rounds what cannot be rounded, an engine would not read the output, or the shared expert
            cannot be folded.
        FormatError: a matrix does not fit the format of its scheme.
    """
    source = look_at(checkpoint, from_quantized=from_quantized)
    census = source.census
    used: set[Rule] = set()
    decided = [
        _decide(matrix, census.naming)
        for name, role in census.roles.items()
        for matrix in _matrices(census.tensors[name], role, policy, used, source.quantized.get(name))
    ]
    _check_rules(policy, used)
    if not any(isinstance(one.step.action, Quantize) for one in decided):
        raise PlanError("the policy quantizes nothing: no rule with a scheme matches a tensor")
    config, decided_by = for_engine(noted(checkpoint.config, source), policy.engine), policy.hash
    if fold:
        decided = fold_shared_experts(decided, census, checkpoint.path)
        config, decided_by = folded_config(config), folding_hash(Folding.FOLDED, policy.hash)
    return assemble(checkpoint, source, decided, config=config, decided_by=decided_by, shard_bytes=shard_bytes)


def _check_rules(policy: Policy, used: set[Rule]) -> None:
    """Refuse a rule of the user that decides nothing: it is a slip, or another rule stands before it."""
    for rule in policy.rules:
        if not rule.default and rule not in used:
            raise PlanError(
                f"the policy's rule {rule.match!r} decides no tensor: no role path matches it in the layers that it "
                "names, or earlier rules decide all that do. `qconvert inspect --json` lists the paths as policy_paths"
            )


def _matrices(
    info: TensorInfo, role: TensorRole, policy: Policy, used: set[Rule], reading: Reading | None
) -> Iterator[_Matrix]:
    """The matrices of a tensor with the rules that decide them, which are added to ``used``.

    Experts are decided one by one, however they are stored; a stack of which none is rounded stays whole.
    """
    whole = Slice(tensor=info.name, begin=0, end=info.numel // info.row_width)
    stacked = role.kind in STACKED and role.expert is None
    decided = []
    for one, part in unstack(info, role) if stacked else [(role, whole)]:
        rule, consulted = decide(policy, one, info.name)
        used.update(consulted)
        decided.append((one, part, rule))
    if stacked and all(rule.scheme is None for _, _, rule in decided):
        decided = [(role, whole, decided[0][2])]
    for one, part, rule in decided:
        yield _Matrix(info=info, role=one, part=part, rule=rule, reading=reading)


def _decide(matrix: _Matrix, naming: Naming) -> Decided:
    rule = matrix.rule
    name = name_of(matrix.role, naming)
    if rule.scheme is None:
        if matrix.packed is not None:
            return _dequantize(matrix, name, matrix.packed)
        return keep(matrix.info, matrix.role, matrix.part, matrix.shape, name=name, reason=rule.reason)
    refuse_by_nature(rule, matrix.role, name)
    return _quantize(matrix, module_of(name), rule.scheme)


def _dequantize(matrix: _Matrix, name: str, packed: Packed) -> Decided:
    reason = f"{matrix.rule.reason}; {packed.scheme} in the source"
    step = Step(
        inputs=matrix.inputs,
        role=matrix.role,
        action=Dequantize(reason=reason, name=name),
        outputs=(name,),
        peak_bytes=packed_peak_bytes(packed, 1),
        packed=packed,
    )
    return Decided(step=step, stored=((DType.BF16, packed.shape),), module=kept_module(matrix.role, packed.shape, name))


def _quantize(matrix: _Matrix, module: str, scheme: Scheme) -> Decided:
    rule = matrix.rule
    try:
        storage = _storage(
            scheme, rule.method, prod(matrix.shape[:-1]), matrix.shape[-1], matrix.info.dtype.itemsize, matrix.packed
        )
    except FormatError as error:
        raise FormatError(f"{module} cannot be stored as {scheme}: {error}") from None
    step = Step(
        inputs=matrix.inputs,
        role=matrix.role,
        action=Quantize(reason=rule.reason, module=module, scheme=scheme, format=storage.format, search=rule.search),
        outputs=tuple(f"{module}.{suffix}" for suffix in storage.suffixes),
        peak_bytes=storage.peak_bytes,
        packed=matrix.packed,
    )
    decision = ModuleDecision(name=module, shape=storage.shape, scheme=scheme, format=storage.format)
    return Decided(step=step, stored=storage.stored, module=decision)


@lru_cache(maxsize=64)
def _storage(
    scheme: Scheme, method: str | None, rows: int, cols: int, itemsize: int, packed: Packed | None
) -> _Storage:
    """How a [rows, cols] matrix of elements of ``itemsize`` bytes is stored in ``scheme`` for the loader ``method``.

    ``packed`` says how it is read where it is quantized.

    Raises:
        FormatError: no format holds the scheme, or not this shape.
    """
    form = format_for(scheme, method)
    parts = form.parts(scheme, (rows, cols))
    multiple = form.row_block(scheme, (rows, cols))
    plain_peak = peak_bytes(rows, cols, multiple, itemsize, rounding=True)
    return _Storage(
        shape=(rows, cols),
        format=form.name,
        suffixes=tuple(part.suffix for part in parts),
        stored=tuple((part.dtype, part.shape) for part in parts),
        peak_bytes=plain_peak if packed is None else packed_peak_bytes(packed, multiple),
    )
