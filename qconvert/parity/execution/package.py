"""Faults of execution of a package: localised where it gives the states of its layers, else found in its logits."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from qconvert.core.role import EXPERT_KINDS, Kind, Section
from qconvert.memory import available_bytes
from qconvert.parity.causes import CauseKind, cause
from qconvert.parity.execution.layer_blocks import Findings, Precision
from qconvert.parity.execution.localise import HEAD, localise
from qconvert.parity.execution.probes import alone, probe_package
from qconvert.parity.execution.recorded import HIDDEN, Recorded
from qconvert.parity.sides import of_package
from qconvert.weights.source import CheckpointWeights
from qconvert.weights.spill import SpillStore

if TYPE_CHECKING:
    from qconvert.onnx_export.runtime import Package

EXACT = 1e-3
"""Relative error of a block in float32; what kernels differ by is 1e-5, what faults cost is 1e-2 and more."""

HALVES = 0.01
"""The same of attention whose keys and values are float16 between calls: 4e-4 on the demo."""

ROUNDED = 0.1
"""The same where kernels round what they multiply to eight bits, which costs a block 1 to 3% of its output."""

_OF_EXPERTS = (*EXPERT_KINDS, Kind.SHARED_GATE, Kind.SHARED_UP, Kind.SHARED_DOWN)


def check_package(
    source: CheckpointWeights,
    batches: Sequence[Tensor],
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Findings:
    """Run the package whose weights are ``source`` on some of the token windows [B, T] and find its faults.

    ``source`` has the shared expert by itself.
    """
    from qconvert.onnx_export.runtime import Package

    ids = max(batches, key=lambda one: one.shape[1])
    with SpillStore(available_bytes() // 4) as store:
        package = Package(source.checkpoint.path)
        runs = list(probe_package(package, ids, store))
        if runs[0].take(0, HIDDEN) is None:
            return _consistent(source, package, runs)
        del package  # the reference needs the memory
        return localise(source, runs, precision_of(source), progress)


def _consistent(source: CheckpointWeights, package: Package, runs: Sequence[Recorded]) -> Findings:
    """Without states of layers: whether calls and padding change what the package says of the same tokens."""
    package_weights = of_package(source)
    halves = package_weights is not None and package_weights.keeps_halves
    found, limit = Findings(), ROUNDED if _rounds(source) or halves else EXACT
    for run in runs:
        errors = [_off(package, run, row) for row in range(len(run.ids))]
        worst = max(errors)
        if worst > limit and (run.padded or len(run.calls) > 1):
            kind = CauseKind.STATE if len(run.calls) > 1 else CauseKind.PADDING
            text = (
                f"{run.name} its logits in row {errors.index(worst)} are off by {worst:.2g} of their size from those "
                "of the same tokens alone in one call; export it with --taps to learn in which layer"
            )
            found.causes.append(cause(kind, None, text, where="the package"))
    return found


def _off(package: Package, run: Recorded, row: int) -> float:
    """The largest relative error of logits in a row against its real tokens alone; infinite for NaN."""
    given = run.logits[row][run.real[row]] if run.logits is not None else None
    if given is None and run.last is not None:
        given = run.last[row].unsqueeze(0)
    if given is None:
        return 0.0
    expected = alone(package, run, row)[-len(given) :]
    error = (given - expected).norm(dim=1) / expected.norm(dim=1)
    return float(error.nan_to_num(nan=torch.inf).max())


def _rounds(source: CheckpointWeights) -> bool:
    """Whether kernels of a package round what they multiply, anywhere in its decoder."""
    package = of_package(source)
    return package is not None and any(
        package.rounds_inputs(role) for role in package.stored if role.section is Section.TEXT
    )


def precision_of(source: CheckpointWeights) -> Precision:
    """How near the blocks of a package come to the reference: as far as its kernels round, by its weights."""
    package = of_package(source)
    rough: set[tuple[int | None, str]] = set()
    for role in () if package is None else package.stored:
        if package is not None and role.section is Section.TEXT and package.rounds_inputs(role):
            if role.kind in (Kind.HEAD, Kind.EMBEDDING):
                rough.add((None, HEAD))
            else:
                rough.add((role.layer, "experts" if role.kind in _OF_EXPERTS else "mixer"))

    def of(layer: int | None, block: str) -> float:
        if (layer, "mixer" if block.endswith("attention") else block) in rough:
            return ROUNDED
        halves = package is not None and package.keeps_halves and block == "attention"
        return HALVES if halves else EXACT

    return of
