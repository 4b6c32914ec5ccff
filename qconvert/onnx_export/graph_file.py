"""Graphs of packages, read without their weights."""

from __future__ import annotations

from pathlib import Path

import onnx_ir as ir
from google.protobuf.message import DecodeError

from qconvert.core.errors import SourceError


def read_graph(path: Path) -> ir.Graph:
    """The graph in ``path``.

    Raises:
        SourceError: it cannot be read, or is no ONNX model.
    """
    try:
        graph = ir.load(path).graph
    except DecodeError as error:
        raise SourceError(f"{path} is no ONNX model, or damaged: {error}; export the package again") from error
    except OSError as error:
        raise SourceError(f"cannot read {path}: {error.strerror}") from error
    if not len(graph):
        raise SourceError(f"{path} is no ONNX model, or damaged: nothing is in it; export the package again")
    return graph
