"""Which version of ONNX Runtime has which operator, as read from the schemas of its wheels.

Measured with ``get_all_operator_schema`` of onnxruntime 1.25.1, 1.26 to 1.32 (PyPI). What is older than the first of
these counts as being in it.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

import onnx_ir as ir

from qconvert.core.errors import PlanError, UsageError
from qconvert.onnx_export.graph_writer import MICROSOFT
from qconvert.onnx_export.precision import CPU, CUDA

Version = tuple[int, int]

OLDEST: Version = (1, 25)
"""The first version that was looked at."""

DEFAULT: Version = (1, 31)
"""The lower one of the newest packages for CPU (1.32) and GPU (1.31.1)."""

SINCE: Mapping[tuple[str, str], Version] = {
    ("", "CausalConvWithState"): (1, 28),
    ("", "LinearAttention"): (1, 28),
    (MICROSOFT, "CausalConvWithState"): OLDEST,
    (MICROSOFT, "FusedMatMul"): OLDEST,
    (MICROSOFT, "GatedAdd"): (1, 29),
    (MICROSOFT, "GatedRMSNorm"): (1, 29),
    (MICROSOFT, "GatherBlockQuantized"): OLDEST,
    (MICROSOFT, "LinearAttention"): OLDEST,
    (MICROSOFT, "LinearAttentionGate"): (1, 29),
    (MICROSOFT, "MatMulNBits"): OLDEST,
    (MICROSOFT, "MoE"): OLDEST,
    (MICROSOFT, "MultiHeadAttention"): OLDEST,
    (MICROSOFT, "QMoE"): OLDEST,
    (MICROSOFT, "SkipSimplifiedLayerNormalization"): OLDEST,
}
"""Operators that are no older than what is written here; all others of the standard are."""

ATTRIBUTES_SINCE: Mapping[tuple[str, str, str], Version] = {
    (MICROSOFT, "GatedRMSNorm", "activation"): (1, 31),
    (MICROSOFT, "QMoE", "accuracy_level"): (1, 31),
    (MICROSOFT, "QMoE", "weights_prepacked"): (1, 28),
}
"""Attributes that came after their operators."""


_BOTH = (ir.DataType.FLOAT16, ir.DataType.BFLOAT16)
_ALL = (ir.DataType.FLOAT, *_BOTH)

CUDA_SINCE: Mapping[tuple[str, str], Mapping[ir.DataType, Version]] = {
    ("", "Attention"): {**dict.fromkeys(_ALL, (1, 26))},
    (MICROSOFT, "CausalConvWithState"): {
        **dict.fromkeys((ir.DataType.FLOAT, ir.DataType.FLOAT16), OLDEST), ir.DataType.BFLOAT16: (1, 30)
    },
    (MICROSOFT, "FusedMatMul"): dict.fromkeys((ir.DataType.FLOAT, ir.DataType.FLOAT16), OLDEST),
    (MICROSOFT, "GatedAdd"): dict.fromkeys(_ALL, (1, 29)),
    (MICROSOFT, "GatedRMSNorm"): dict.fromkeys(_ALL, (1, 29)),
    (MICROSOFT, "GatherBlockQuantized"): dict.fromkeys(_ALL, OLDEST),
    (MICROSOFT, "LinearAttention"): {
        **dict.fromkeys((ir.DataType.FLOAT, ir.DataType.FLOAT16), OLDEST), ir.DataType.BFLOAT16: (1, 30)
    },
    (MICROSOFT, "LinearAttentionGate"): dict.fromkeys(_ALL, (1, 29)),
    (MICROSOFT, "MatMulNBits"): dict.fromkeys(_ALL, OLDEST),
    (MICROSOFT, "MoE"): dict.fromkeys(_ALL, OLDEST),
    (MICROSOFT, "MultiHeadAttention"): dict.fromkeys(_ALL, OLDEST),
    (MICROSOFT, "QMoE"): dict.fromkeys(_BOTH, OLDEST),
    (MICROSOFT, "SkipSimplifiedLayerNormalization"): {
        ir.DataType.FLOAT: OLDEST, **dict.fromkeys(_BOTH, DEFAULT)
    },
}  # fmt: skip
"""Kernels of the CUDA provider by the narrowest type of their inputs, for all of ONNX Runtime's own operators.

Read, not run: the classes of kernels that ``libonnxruntime_providers_cuda.so`` names in the wheels of onnxruntime-gpu
1.25.1 to 1.31.1. Attention counts from the version that takes masks and several query heads a key head.
"""


OPSETS_SINCE: Mapping[int, Version] = {27: (1, 32)}
"""Versions of the standard that earlier runtimes call unfinished: they load them only when told to."""


def version_named(text: str) -> Version:
    """The version that a user names, patch numbers dropped.

    Raises:
        UsageError: it is none, or older than any that is known.
    """
    match = re.match(r"(\d+)\.(\d+)(\.\d+)?", text)
    if match is None:
        raise UsageError(f"ONNX Runtime version {text!r} is not understood; write for example 1.31")
    version = int(match[1]), int(match[2])
    if version < OLDEST:
        raise UsageError(f"ONNX Runtime {text} is older than {_text(OLDEST)}, the oldest that is known")
    return version


def refuse_newer(graph: ir.Graph, version: Version, ep: str = CPU) -> None:
    """Raise ``PlanError`` with every operator and attribute of ``graph`` that ONNX Runtime ``version`` lacks.

    For the CUDA provider also with every kernel that is missing for the type that a node is given.
    """
    lacking = sorted(newer_than(graph, version) | (cuda_lacks(graph, version) if ep == CUDA else set()))
    if lacking:
        raise PlanError(
            f"ONNX Runtime {_text(version)} does not run this package, it lacks {', '.join(lacking)}: "
            "name a newer one with --ort-version, or install it"
        )


def unfinished_opset(opset: int, version: Version) -> tuple[str, ...]:
    """What must be said where ONNX Runtime ``version`` loads graphs of ``opset`` only when told to."""
    since = OPSETS_SINCE.get(opset, OLDEST)
    if since <= version:
        return ()
    return (
        f"opset {opset} is unfinished to ONNX Runtime before {_text(since)}: set ALLOW_RELEASED_ONNX_OPSET_ONLY=0 in "
        "its environment",
    )


def newer_than(graph: ir.Graph, version: Version) -> set[str]:
    """Operators and attributes of a graph that came after ``version``, with the version that has them."""
    found = set()
    for node in graph.all_nodes():
        name = f"{node.domain or 'ai.onnx'}.{node.op_type}"
        since = SINCE.get((node.domain, node.op_type), OLDEST)
        if since > version:
            found.add(f"{name} (since {_text(since)})")
            continue
        for attribute in node.attributes:
            later = ATTRIBUTES_SINCE.get((node.domain, node.op_type, attribute), OLDEST)
            if later > version:
                found.add(f"{name}'s {attribute} (since {_text(later)})")
    return found


def cuda_lacks(graph: ir.Graph, version: Version) -> set[str]:
    """Kernels of ``CUDA_SINCE`` that came after ``version`` or never, with the version that has them."""
    found = set()
    for node in graph.all_nodes():
        kernels = CUDA_SINCE.get((node.domain, node.op_type))
        if kernels is None and node.domain != MICROSOFT:
            continue
        given = {value.dtype for value in node.inputs if value is not None}
        kind = next((one for one in (ir.DataType.FLOAT16, ir.DataType.BFLOAT16) if one in given), ir.DataType.FLOAT)
        since = (kernels or {}).get(kind)
        if since is None or since > version:
            told = "none so far" if since is None else f"since {_text(since)}"
            found.add(f"the CUDA kernel of {node.domain or 'ai.onnx'}.{node.op_type} for {kind.name.lower()} ({told})")
    return found


def _text(version: Version) -> str:
    return f"{version[0]}.{version[1]}"
