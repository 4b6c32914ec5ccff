"""Stacked experts <-> one matrix each: pure renaming of row ranges, no arithmetic.

Legend: E experts, F expert width, D hidden. A stacked ``gate_up_proj`` is [E, 2F, D], each expert's gate rows before
its up rows; ``down_proj`` is [E, D, F]. Rows are counted over both leading dimensions.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from qconvert.core.plan import Slice
from qconvert.core.role import Kind, TensorRole
from reference_model.config import TextConfig


def expert_slice(role: TensorRole, tensor: str, config: TextConfig) -> Slice:
    """The rows of one expert's matrix inside the stacked tensor that holds it.

    ``gate: e 2F .. e 2F + F``, ``up: e 2F + F .. (e + 1) 2F`` of ``gate_up_proj``; ``down: e D .. (e + 1) D`` of
    ``down_proj``. Reading, it says what to read; writing a stacked tensor, where to write.

    Args:
        role: one expert's gate, up or down.
        tensor: name of the stacked tensor.
        config: sizes.

    Raises:
        ValueError: another role, or an expert beyond E.
    """
    if role.expert is None or not 0 <= role.expert < config.num_experts:
        raise ValueError(f"{role} is not a matrix of one of {config.num_experts} experts")
    width, hidden = config.moe_intermediate_size, config.hidden_size
    match role.kind:
        case Kind.EXPERT_GATE:
            begin, rows = role.expert * 2 * width, width
        case Kind.EXPERT_UP:
            begin, rows = role.expert * 2 * width + width, width
        case Kind.EXPERT_DOWN:
            begin, rows = role.expert * hidden, hidden
        case _:
            raise ValueError(f"{role} is not a matrix of one expert")
    return Slice(tensor=tensor, begin=begin, end=begin + rows)


def stacked_role(role: TensorRole) -> TensorRole:
    """The stacked tensor's role that holds one expert's matrix.

    Raises:
        ValueError: not a routed expert's matrix.
    """
    match role.kind:
        case Kind.EXPERT_GATE | Kind.EXPERT_UP:
            return replace(role, kind=Kind.EXPERT_GATE_UP, expert=None)
        case Kind.EXPERT_DOWN:
            return replace(role, expert=None)
        case _:
            raise ValueError(f"{role} is not a matrix of one expert")


def expert_roles(stacked: TensorRole, experts: int) -> tuple[TensorRole, ...]:
    """The matrices inside a stacked tensor, in the order of its rows.

    Raises:
        ValueError: ``stacked`` is not a stacked tensor.
    """
    if stacked.expert is not None or stacked.kind not in (Kind.EXPERT_GATE_UP, Kind.EXPERT_DOWN):
        raise ValueError(f"{stacked} is not a tensor of stacked experts")
    kinds = (Kind.EXPERT_GATE, Kind.EXPERT_UP) if stacked.kind is Kind.EXPERT_GATE_UP else (Kind.EXPERT_DOWN,)
    return tuple(replace(stacked, kind=kind, expert=expert) for expert in range(experts) for kind in kinds)


def stack_gate_up(gates: Sequence[Tensor], ups: Sequence[Tensor]) -> Tensor:
    """E gates and E ups, each [F, D], as [E, 2F, D], in their own element type."""
    return torch.stack([torch.cat(pair) for pair in zip(gates, ups, strict=True)])


def stack_down(downs: Sequence[Tensor]) -> Tensor:
    """E downs, each [D, F], as [E, D, F], in their own element type."""
    return torch.stack(list(downs))
