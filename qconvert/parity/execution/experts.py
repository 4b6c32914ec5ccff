"""The experts of a layer, right or with one of the faults that engines have.

Shapes: R rows (tokens that are no padding), D hidden, E experts, k of them a row.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

from qconvert.parity.execution.mixers import RIGHT, Broken
from qconvert.weights.source import CheckpointWeights
from reference_model.load import load_expert
from reference_model.moe import SparseMoe, combine, dispatch, expert_mlp


class ExpertLayer:
    """The experts of one layer; routed ones are read one at a time."""

    def __init__(self, source: CheckpointWeights, layer: int, block: SparseMoe) -> None:
        """``block`` has the weights of the router and the shared expert."""
        self._source, self._name, self._block = source, f"layers.{layer}.mlp.experts", block

    def router(self, x: Tensor) -> Tensor:
        """The router's logits [R, E] of x [R, D]."""
        return functional.linear(x, self._block.gate.weight)

    def added(self, x: Tensor, logits: Tensor, broken: Broken = RIGHT) -> Tensor:
        """What they add to x [R, D], where the router says ``logits`` [R, E]."""
        shared = torch.zeros_like(x)
        if "shared expert" not in broken and isinstance(self._block.shared_expert, nn.Module):
            gate = torch.sigmoid(self._block.shared_expert_gate(x))
            shared = self._block.shared_expert(x) * (1.0 if "gate of the shared expert" in broken else gate)
        if "routed experts" in broken:
            return shared
        best, experts = logits.softmax(-1).topk(self._block.gate.top_k, dim=-1)
        weights = best if "sum of routing weights" in broken else best / best.sum(-1, keepdim=True)
        if "routing weights" in broken:
            weights = torch.full_like(best, 1 / best.shape[-1])
        where = dispatch(experts, logits.shape[-1])
        rows = x.index_select(0, where.token)
        for expert, part in enumerate(torch.split(rows, where.counts)):
            if len(part):
                gate_up, down = load_expert(self._source, self._name, expert, torch.float32)
                if "gate and up" in broken:
                    gate_up = gate_up.roll(len(gate_up) // 2, 0)
                part.copy_(expert_mlp(part, gate_up, down))
        return combine(rows, where, weights) + shared
