"""A plan -> the same with errors weighted by what the inputs of matrices are like, where that is known."""

from __future__ import annotations

from dataclasses import replace

from qconvert.core.by_statistics import IMATRIX, InputStatistics
from qconvert.core.errors import PlanError
from qconvert.core.plan import Plan, Quantize, Step
from qconvert.core.role import Kind
from qconvert.io.checkpoint import Checkpoint


def weigh(plan: Plan, source: Checkpoint, statistics: InputStatistics) -> Plan:
    """Mark each matrix whose errors are weighted, and say of each that is rounded why it is or is not.

    Raises:
        PlanError: the statistics are of matrices with other inputs.
    """
    return replace(plan, steps=tuple(_weighed(step, source, statistics) for step in plan.steps))


def _weighed(step: Step, source: Checkpoint, statistics: InputStatistics) -> Step:
    action = step.action
    if not isinstance(action, Quantize):
        return step
    weighted, told = _decide(step, action, source, statistics)
    method = IMATRIX if weighted else None
    return replace(step, action=replace(action, method=method, reason=f"{action.reason}; {told}"))


def _decide(step: Step, action: Quantize, source: Checkpoint, statistics: InputStatistics) -> tuple[bool, str]:
    role = step.role
    if not action.search:
        return False, "its scales are not searched"
    if not statistics.has(role):
        return False, "its inputs were not looked at: scales by squared error alone"
    expected, found = _inputs(step, source), statistics.importance(role).numel()
    if found != expected:
        raise PlanError(f"{step.key} has {expected} inputs, the statistics tell of {found}: calibrate again")
    if statistics.tokens(role):
        return True, "scales by the mean squares of its inputs"
    if role.kind is Kind.EXPERT_DOWN:
        return False, "no token reached it: scales by squared error alone"
    return True, "no token reached it: scales by the mean squares of its layer's inputs"


def _inputs(step: Step, source: Checkpoint) -> int:
    """Columns of the matrix that is rounded; a piece is cut from it afterwards."""
    if step.mosaic is not None:
        return step.mosaic.tiles[0].width
    if step.packed is not None:
        return step.packed.shape[1]
    return source.tensors[step.inputs[0].tensor].row_width
