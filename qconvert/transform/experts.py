"""Stacked experts <-> one matrix each: pure renaming of row ranges, no arithmetic.

Legend: E experts, F expert width, D hidden. A stacked ``gate_up_proj`` is [E, 2F, D], each expert's gate rows before
its up rows; ``down_proj`` is [E, D, F]. Rows are counted over both leading dimensions.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from qconvert.core.plan import Slice
from qconvert.core.role import Kind, TensorRole
from qconvert.core.tensor_info import TensorInfo

_INSIDE = {
    Kind.EXPERT_GATE_UP: (Kind.EXPERT_GATE, Kind.EXPERT_UP),
    Kind.EXPERT_DOWN: (Kind.EXPERT_DOWN,),
}


def unstack(info: TensorInfo, role: TensorRole) -> Iterator[tuple[TensorRole, Slice]]:
    """The matrices inside a stacked tensor with their rows, in the order of the rows.

    ``gate: e 2F .. e 2F + F``, ``up: e 2F + F .. (e + 1) 2F`` of ``gate_up_proj`` [E, 2F, D];
    ``down: e D .. (e + 1) D`` of ``down_proj`` [E, D, F]. Reading, a slice says what to read; writing a stacked
    tensor, where to write.

    Raises:
        ValueError: ``role`` is not that of a stacked tensor, or the shape is not [E, N, K] with an even N of gate_up.
    """
    kinds = _INSIDE.get(role.kind) if role.expert is None else None
    if kinds is None or len(info.shape) != 3 or info.shape[1] % len(kinds):
        raise ValueError(f"{info.name} of shape {list(info.shape)} is not a tensor of stacked experts")
    experts, rows = info.shape[0], info.shape[1] // len(kinds)
    begin = 0
    for expert in range(experts):
        for kind in kinds:
            yield replace(role, kind=kind, expert=expert), Slice(tensor=info.name, begin=begin, end=begin + rows)
            begin += rows


def stacked_role(role: TensorRole) -> TensorRole:
    """The role of the stacked tensor that holds one expert's matrix.

    Raises:
        ValueError: not a routed expert's matrix.
    """
    stacked = {Kind.EXPERT_GATE: Kind.EXPERT_GATE_UP, Kind.EXPERT_UP: Kind.EXPERT_GATE_UP}
    kind = stacked.get(role.kind, role.kind)
    if kind not in _INSIDE or role.expert is None:
        raise ValueError(f"{role} is not a matrix of one expert")
    return replace(role, kind=kind, expert=None)


def stack_gate_up(gates: Sequence[Tensor], ups: Sequence[Tensor]) -> Tensor:
    """E gates and E ups, each [F, D], as [E, 2F, D], in their own element type."""
    return torch.stack([torch.cat(pair) for pair in zip(gates, ups, strict=True)])


def stack_down(downs: Sequence[Tensor]) -> Tensor:
    """E downs, each [D, F], as [E, D, F], in their own element type."""
    return torch.stack(list(downs))
