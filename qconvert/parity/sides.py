"""The sides of a comparison: checkpoints, and packages whose weights are read back."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from qconvert.core.errors import SourceError
from qconvert.core.role import Section
from qconvert.io.source_folder import WEIGHTS_SUFFIX, is_package
from qconvert.weights.source import CheckpointWeights
from qconvert.weights.unfolded import unfolded

if TYPE_CHECKING:
    from qconvert.onnx_export.package_weights import PackageWeights


def open_side(path: Path, *, round_to: torch.dtype | None = None, strict: bool = True) -> CheckpointWeights:
    """The weights of a checkpoint, or those that an ONNX package holds; see ``CheckpointWeights.open``.

    Raises:
        SourceError: neither, or a package that others made, whose weights nobody can tell.
    """
    if not is_package(path):
        return CheckpointWeights.open(path, round_to=round_to, strict=strict)
    # Here, because onnx takes a while to import, and checkpoints do not need it.
    from qconvert.onnx_export.package_weights import PackageWeights

    return PackageWeights.open(path, strict=strict)


def of_package(source: CheckpointWeights) -> PackageWeights | None:
    """The same weights where they are a package's, else ``None``."""
    if not is_package(source.checkpoint.path):
        return None
    from qconvert.onnx_export.package_weights import PackageWeights

    return source if isinstance(source, PackageWeights) else None


def refuse_foreign(path: Path) -> None:
    """Say of graphs that another exporter wrote what can be done with them; anything else passes.

    qconvert's packages have their weights in safetensors files beside the graph, checkpoints have weights anyway.

    Raises:
        SourceError: such a file, or a folder with nothing else.
    """
    graphs = [path] if path.suffix == ".onnx" and path.is_file() else [*path.glob("*.onnx"), *path.glob("onnx/*.onnx")]
    if graphs and not any(path.glob(f"*{WEIGHTS_SUFFIX}")):
        raise SourceError(
            f"{graphs[0]}: no checkpoint, and no package of qconvert either, which has weights in safetensors files "
            "beside the graph: another exporter wrote it, whose weights cannot be told by their names. Save the "
            "log-probabilities that its engine gives and compare those (docs/parity-metrics.md, saved "
            "log-probabilities), or export the checkpoint with `qconvert export-onnx`"
        )


def comparable(
    ours: CheckpointWeights, theirs: CheckpointWeights, *, round_to: torch.dtype | None = None
) -> tuple[CheckpointWeights, CheckpointWeights]:
    """Both under the roles of the original; what a package holds in the float types of the other side."""
    packages = of_package(ours), of_package(theirs)
    plain_ours = unfolded(ours) if packages[0] is None else packages[0].unfolded()
    if packages[1] is None:
        return plain_ours, unfolded(theirs, round_to=round_to)
    packages[1].resemble(plain_ours)
    return plain_ours, packages[1].unfolded()


def left_out(source: CheckpointWeights) -> tuple[Collection[Section], Collection[str]]:
    """Parts of the checkpoint that a package was asked to do without, and the files that only they need."""
    package = of_package(source)
    return ((), ()) if package is None else (package.left_out, package.left_out_files)
