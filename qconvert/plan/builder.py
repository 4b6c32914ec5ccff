"""Checkpoint and policy -> plan: every tensor decided, every output byte placed, every rule of the engines checked."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from math import prod

from qconvert.arch.census import check
from qconvert.arch.families import read_config, reject_quantized
from qconvert.arch.names import Naming, module_of, name_of
from qconvert.arch.shapes import STACKED, kept_by_nature
from qconvert.core.errors import FormatError, PlanError, SourceError
from qconvert.core.plan import Keep, Plan, Quantize, Slice, Step
from qconvert.core.role import Kind, TensorRole
from qconvert.core.scheme import Scheme
from qconvert.core.tensor_info import TensorInfo
from qconvert.formats.engine_rules import ModuleDecision
from qconvert.formats.quantization_config import quantization_config
from qconvert.formats.table import format_for, format_named
from qconvert.io.checkpoint import Checkpoint
from qconvert.plan.layout import DEFAULT_SHARD_BYTES, OutputTensor, lay_out
from qconvert.plan.policy import Policy, Rule
from qconvert.plan.row_blocks import peak_bytes
from qconvert.transform.experts import unstack


@dataclass(frozen=True, slots=True, kw_only=True)
class _Matrix:
    """A tensor, or one expert's part of a stacked one, before it is decided."""

    info: TensorInfo
    role: TensorRole
    part: Slice
    rule: Rule

    @property
    def shape(self) -> tuple[int, ...]:
        rows = self.part.end - self.part.begin
        whole = rows * self.info.row_width == self.info.numel
        return self.info.shape if whole else (rows, self.info.row_width)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Decided:
    step: Step
    outputs: tuple[OutputTensor, ...]
    module: ModuleDecision | None


def build_plan(checkpoint: Checkpoint, policy: Policy, *, shard_bytes: int = DEFAULT_SHARD_BYTES) -> Plan:
    """Decide every tensor of ``checkpoint`` and place every byte of the output; reads headers only.

    Stacked experts are split where any of them is quantized, and stay stacked otherwise. Steps and outputs come in
    the order of names, numbers in them by value and experts of one projection together: how the source is cut into
    files changes nothing.

    Raises:
        SourceError: another architecture, tensors missing, unknown or misshapen, or quantized already.
        PlanError: a rule rounds what cannot be rounded, or an engine would not read the output.
        FormatError: a matrix does not fit the format of its scheme.
    """
    reject_quantized(checkpoint.config, checkpoint.path, checkpoint.tensors)
    config = read_config(checkpoint.config, checkpoint.path)
    try:
        census = check(checkpoint.tensors, config)
    except SourceError as error:
        raise SourceError(f"{checkpoint.path}: {error}") from None
    used: set[Rule] = set()
    decided = [
        _decide(matrix, census.naming)
        for name, role in census.roles.items()
        for matrix in _matrices(census.tensors[name], role, policy, used)
    ]
    _check_rules(policy, used)
    decided.sort(key=_order)
    modules = [one.module for one in decided if one.module is not None]
    if not any(module.scheme is not None for module in modules):
        raise PlanError("the policy quantizes nothing: no rule with a scheme matches a tensor")
    return Plan(
        steps=tuple(one.step for one in decided),
        layout=lay_out([one.outputs for one in decided], shard_bytes),
        source_hash=checkpoint.header_hash,
        policy_hash=policy.hash,
        config={**checkpoint.config, "quantization_config": quantization_config(modules)},
        side_files=tuple(file.name for file in checkpoint.side_files),
        left_out=tuple(sorted(checkpoint.left_out.items())),
    )


def _order(decided: _Decided) -> tuple[list[tuple[int, str]], int]:
    expert = decided.step.role.expert
    name = decided.step.outputs[0].replace(f".experts.{expert}.", ".experts.")
    words = [(int(word), "") if word.isdigit() else (-1, word) for word in name.split(".")]
    return words, -1 if expert is None else expert


def _check_rules(policy: Policy, used: set[Rule]) -> None:
    """Refuse a rule of the user that decides nothing: it is a slip, or another rule stands before it."""
    for rule in policy.rules:
        if not rule.default and rule not in used:
            raise PlanError(
                f"the policy's rule {rule.match!r} decides no tensor: no role path matches it in the layers that it "
                "names, or earlier rules decide all that do. `qconvert inspect --json` lists the paths as policy_paths"
            )


def _matrices(info: TensorInfo, role: TensorRole, policy: Policy, used: set[Rule]) -> Iterator[_Matrix]:
    """The matrices of a tensor with the rules that decide them, which are added to ``used``.

    Experts are decided one by one, however they are stored; a stack of which none is rounded stays whole.
    """
    whole = Slice(tensor=info.name, begin=0, end=info.numel // info.row_width)
    stacked = role.kind in STACKED and role.expert is None
    decided = [(one, part, policy.decide(one)) for one, part in (unstack(info, role) if stacked else [(role, whole)])]
    used.update(rule for _, _, rule in decided)
    if stacked and all(rule.scheme is None for _, _, rule in decided):
        decided = [(role, whole, decided[0][2])]
    for one, part, rule in decided:
        yield _Matrix(info=info, role=one, part=part, rule=rule)


def _decide(matrix: _Matrix, naming: Naming) -> _Decided:
    rule = matrix.rule
    name = name_of(matrix.role, naming)
    if rule.scheme is None:
        return _keep(matrix, name)
    natural = kept_by_nature(matrix.role)
    if natural is not None:
        raise PlanError(
            f"the policy's rule {rule.match!r} rounds {name} to {rule.scheme}, but that is {natural}: "
            "put a rule with 'keep = true' for it before"
        )
    return _quantize(matrix, module_of(name), rule.scheme)


def _keep(matrix: _Matrix, name: str) -> _Decided:
    info = matrix.info
    rows = matrix.part.end - matrix.part.begin
    step = Step(
        inputs=(matrix.part,),
        role=matrix.role,
        action=Keep(reason=matrix.rule.reason, name=name),
        outputs=(name,),
        peak_bytes=peak_bytes(rows, info.row_width, 1, info.dtype.itemsize, rounding=False),
    )
    outputs = (OutputTensor(name=name, dtype=info.dtype, shape=matrix.shape),)
    return _Decided(step=step, outputs=outputs, module=_kept_module(matrix, name))


def _kept_module(matrix: _Matrix, name: str) -> ModuleDecision | None:
    """What the engines' lists must say of a kept tensor; vectors, tables and convolutions are no linear modules."""
    linear_by_nature = matrix.role.kind in (Kind.ROUTER, Kind.SHARED_EXPERT_GATE)
    if kept_by_nature(matrix.role) is not None and not linear_by_nature:
        return None
    rows, cols = matrix.shape[-2:]
    stacked = matrix.shape[0] if len(matrix.shape) == 3 else 0
    return ModuleDecision(name=module_of(name), shape=(rows, cols), stacked=stacked)


def _quantize(matrix: _Matrix, module: str, scheme: Scheme) -> _Decided:
    rule = matrix.rule
    action = Quantize(
        reason=rule.reason, module=module, scheme=scheme, format=format_for(scheme).name, search=rule.search
    )
    shape = (prod(matrix.shape[:-1]), matrix.shape[-1])
    form = format_named(action.format)
    try:
        parts = form.parts(action.scheme, shape)
    except FormatError as error:
        raise FormatError(f"{module} cannot be stored as {action.scheme}: {error}") from None
    outputs = tuple(OutputTensor(name=f"{module}.{part.suffix}", dtype=part.dtype, shape=part.shape) for part in parts)
    multiple = form.row_block(action.scheme)
    step = Step(
        inputs=(matrix.part,),
        role=matrix.role,
        action=action,
        outputs=tuple(output.name for output in outputs),
        peak_bytes=peak_bytes(*shape, multiple, matrix.info.dtype.itemsize, rounding=True),
    )
    decision = ModuleDecision(name=module, shape=shape, scheme=action.scheme, format=action.format)
    return _Decided(step=step, outputs=outputs, module=decision)
