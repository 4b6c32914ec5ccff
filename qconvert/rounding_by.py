"""Plan and run by what decides besides weights and policy: nothing, statistics of inputs, or text that is run."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from qconvert.core.by_statistics import ByStatistics, check_statistics
from qconvert.core.errors import UsageError
from qconvert.core.plan import Plan
from qconvert.execute import Outcome
from qconvert.io.checkpoint import Checkpoint
from qconvert.io.sink import Sink
from qconvert.plan.weighing import weigh
from qconvert.run import Progress, run
from qconvert.sequential.calibration import METHODS, Calibration
from qconvert.sequential.memory import check_room
from qconvert.sequential.run import plan_calibrated, run_calibrated
from qconvert.weights.boundaries import Boundaries
from qconvert.weights.source import CheckpointWeights

By = Calibration | ByStatistics


def plan_by(plan: Plan, source: Checkpoint, by: By | None) -> Plan:
    """The same plan, marked with what looks at inputs.

    Raises:
        PlanError, SourceError, UsageError: see ``plan_calibrated`` and ``weigh``.
    """
    match by:
        case None:
            return plan
        case ByStatistics():
            return weigh(plan, source, by.statistics)
        case Calibration():
            return plan_calibrated(plan, source, by)


def check_memory_by(by: By | None, source: Checkpoint, jobs: int, memory: int) -> None:
    """Refuse what does not fit beside the steps of a plan themselves, before anything is begun.

    Raises:
        PlanError: a calibrated conversion needs more than ``memory``.
    """
    if isinstance(by, Calibration):
        check_room(CheckpointWeights(source).config.text, jobs, memory, by.tokens, by.tried(jobs))


def run_by(
    by: By | None,
    plan: Plan,
    source: Checkpoint,
    sink: Sink,
    *,
    jobs: int,
    memory: int,
    device: torch.device,
    states: Boundaries | None = None,
    progress: Progress,
) -> dict[str, Outcome]:
    """Write what ``plan_by`` made of a plan; arguments and errors as for ``run`` and ``run_calibrated``."""
    if isinstance(by, Calibration):
        return run_calibrated(plan, source, sink, by, jobs=jobs, memory=memory, states=states, progress=progress)
    inputs = None if by is None else by.statistics
    return run(plan, source, sink, jobs=jobs, memory=memory, device=device, inputs=inputs, progress=progress)


def check_by(noted: Mapping[str, Any] | None, given: By | None, where: str) -> None:
    """Refuse to repeat a conversion by something else than it was done by.

    Args:
        noted: what its manifest says of how inputs were looked at; ``None`` where they were not.
        given: what it is to be repeated by.
        where: begins the message.

    Raises:
        UsageError: there is nothing, or something else.
    """
    calibrated = noted is not None and noted.get("method") in METHODS
    if noted is None or not calibrated:
        if isinstance(given, Calibration):
            raise UsageError(f"{where} was not calibrated: drop --calibration-data")
        check_statistics(noted, given, where)
        return
    if not isinstance(given, Calibration):
        raise UsageError(
            f"{where} was calibrated by {noted['method']}: give what it was calibrated with by --calibration-data, or "
            "'default' for the texts that come along"
        )
    for key, value in given.entry.items():
        if _without_files(noted.get(key)) != _without_files(value):
            raise UsageError(
                f"{where} was calibrated otherwise: its {key} is {_short(noted.get(key))}, not {_short(value)}"
            )


def _without_files(value: Any) -> Any:
    """What a record of texts says of the tokens themselves: the same text may lie in another file."""
    if not isinstance(value, Mapping) or "ids_sha256" not in value:
        return value
    return {key: said for key, said in value.items() if key != "texts"}


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 200 else f"{text[:197]}..."
