"""Faults of execution of a package that was exported with taps."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from torch import Tensor

from qconvert.core.role import EXPERT_KINDS, Kind, Section
from qconvert.memory import available_bytes
from qconvert.parity.execution.localise import HEAD, Findings, Precision, localise
from qconvert.parity.execution.probes import probe_package
from qconvert.parity.sides import of_package
from qconvert.weights.source import CheckpointWeights
from qconvert.weights.spill import SpillStore

EXACT = 1e-3
"""Relative error of a block in float32; what kernels differ by is 1e-5, what faults cost is 1e-2 and more."""

ROUNDED = 0.1
"""The same where kernels round what they multiply to eight bits, which costs a block 1 to 2% of its output."""

_OF_EXPERTS = (*EXPERT_KINDS, Kind.SHARED_GATE, Kind.SHARED_UP, Kind.SHARED_DOWN)


def check_package(
    source: CheckpointWeights,
    batches: Sequence[Tensor],
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Findings:
    """Run the package whose weights are ``source`` on some of the token windows [B, T] and localise its faults.

    ``source`` has the shared expert by itself.
    """
    from qconvert.onnx_export.runtime import Package

    ids = max(batches, key=lambda one: one.shape[1])
    with SpillStore(available_bytes() // 4) as store:
        package = Package(source.checkpoint.path)
        runs = list(probe_package(package, ids, store))
        del package  # the reference needs the memory
        return localise(source, runs, precision_of(source), progress)


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
        block = "mixer" if block.endswith("attention") else block
        return ROUNDED if (layer, block) in rough else EXACT

    return of
