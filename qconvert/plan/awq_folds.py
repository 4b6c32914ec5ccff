"""Marks the steps of a plan that AWQ folds: which tensors are divided, and which make up for it."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace

from qconvert.core.awq_fold import AwqFold
from qconvert.core.dtypes import DType
from qconvert.core.errors import PlanError
from qconvert.core.plan import Cast, Dequantize, Keep, Plan, Quantize, Reencode, Rescale, Step
from qconvert.core.role import Kind, Section

_Place = tuple[Section, int | None, int | None, bool]

_SHARED = (Kind.SHARED_UP, Kind.SHARED_DOWN)


def fold_by_awq(plan: Plan, folds: Iterable[AwqFold]) -> Plan:
    """The same plan with the steps of ``folds`` marked: kept tensors that take part are rescaled instead of copied.

    A fold is left out where nothing that reads the producer is rounded, which the producer's reason says.

    Raises:
        PlanError: a fold that was asked for changes nothing anywhere, or a tensor that takes part is laid together.
    """
    steps = list(plan.steps)
    dtypes = {info.name: info.dtype for info in plan.layout.tensors}
    folds = tuple(folds)
    idle = pointless_folds(plan, folds)
    if idle:
        raise PlanError(
            f"the fold {idle[0].value!r} rounds nothing more finely: no matrix that it scales is rounded by the "
            f"policy; drop it from --awq-folds, or round one of {scaled_by(idle[0])}"
        )
    for fold in folds:
        members = _members(fold, steps)
        worth = {place for place, numbers in members.items() if _pays(fold, [steps[n] for n in numbers])}
        for place, numbers in members.items():
            for number in numbers:
                steps[number] = _marked(steps[number], fold, dtypes, folded=place in worth)
    return replace(plan, steps=tuple(steps))


def pointless_folds(plan: Plan, folds: Iterable[AwqFold]) -> tuple[AwqFold, ...]:
    """Those of ``folds`` that round nothing more finely anywhere; never up and down, which nobody has to ask for."""
    return tuple(
        fold
        for fold in folds
        if fold is not AwqFold.UP_DOWN
        and not any(_pays(fold, [plan.steps[n] for n in numbers]) for numbers in _members(fold, plan.steps).values())
    )


def scaled_by(fold: AwqFold) -> str:
    """What a fold scales, for people."""
    return ", ".join(sorted(kind.value for kind in fold.parts.readers))


def _members(fold: AwqFold, steps: Sequence[Step]) -> Mapping[_Place, list[int]]:
    """The numbers of the steps that take part, by what is folded together."""
    members: defaultdict[_Place, list[int]] = defaultdict(list)
    kinds = {*fold.parts.producers, *fold.parts.readers}
    for number, step in enumerate(steps):
        if step.role.kind in kinds:
            members[_place(fold, step)].append(number)
    return members


def _place(fold: AwqFold, step: Step) -> _Place:
    """What is folded together: a layer, or an expert, routed or shared."""
    role, of_expert = step.role, fold is AwqFold.UP_DOWN
    return role.section, role.layer, role.expert if of_expert else None, of_expert and role.kind in _SHARED


def _pays(fold: AwqFold, steps: Iterable[Step]) -> bool:
    """Whether something that reads the producer is rounded, and of up and down both are."""
    rounded = {step.role.kind for step in steps if isinstance(step.action, Quantize)}
    read = bool(rounded & {*fold.parts.readers})
    return read and (fold is not AwqFold.UP_DOWN or bool(rounded & {*fold.parts.producers}))


def _marked(step: Step, fold: AwqFold, dtypes: Mapping[str, DType], *, folded: bool) -> Step:
    action, produces = step.action, step.role.kind in fold.parts.producers
    if not folded:
        if not produces or fold is AwqFold.UP_DOWN:
            return step
        said = f"{action.reason}; {fold.value} not folded: nothing that reads it is rounded"
        return replace(step, action=replace(action, reason=said))
    said = f"{action.reason}; {fold.value} {'divides what it gives' if produces else 'scales its columns'}"
    match action:
        case Quantize() | Rescale():
            return replace(step, action=replace(action, reason=said))
        case Keep(name=name) | Dequantize(name=name):
            if step.mosaic is not None or step.stack:
                raise PlanError(
                    f"{step.key} is laid together from other matrices and cannot be scaled: quantize with --method awq "
                    "first, and fold the result with `qconvert fold`"
                )
            return replace(step, action=Rescale(reason=said, name=name, dtype=dtypes[name]))
        case Cast() | Reencode():
            raise PlanError(f"{step.key} is to be stored otherwise ({action}), which leaves no room for factors")
