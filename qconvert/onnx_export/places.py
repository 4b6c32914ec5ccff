"""Whether a graph reads its weights from where they are: any tool may write a safetensors file in another order."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path

import onnx_ir as ir

from qconvert.core.errors import SourceError
from qconvert.core.tensor_info import TensorInfo
from qconvert.io.checkpoint import Checkpoint
from qconvert.onnx_export.joining import stretch


def misplaced(graph: ir.Graph, infos: Mapping[str, TensorInfo]) -> Iterator[tuple[str, str]]:
    """Initializers that are read from elsewhere than where the tensors of their names are, and from where in words."""
    for name, value in graph.initializers.items():
        held = value.const_value
        if isinstance(held, ir.ExternalTensor):
            asked = (Path(held.location).name, held.offset or 0, held.length)
            if asked != stretch(name, infos):
                yield name, f"from {asked[0]} at byte {asked[1]}, where something else is"


def check_places(path: Path, graph: ir.Graph) -> None:
    """Look at the headers of the files beside the graph in ``path``.

    Raises:
        SourceError: a weight is not where the graph reads it, or the files cannot be read.
    """
    with Checkpoint.open(path.parent, package=True) as checkpoint:
        for name, found in misplaced(graph, checkpoint.tensors):
            raise SourceError(f"{path} reads {name} {found}: the weights were rewritten; export the package again")
