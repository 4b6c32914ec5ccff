"""One QMoE node of ONNX Runtime, built from a folded layer on disk, computes what the reference block does."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import onnxruntime
import pytest
import torch
from torch import Tensor

from benchmarks.moe_node import Block, block_model, in_turns, pack, stacked
from qconvert.convert import convert
from qconvert.core.role import Kind, Section, TensorRole
from qconvert.core.scheme import int4
from qconvert.plan.policy import default_policy
from qconvert.plan.presets import preset_rules
from qconvert.weights.source import CheckpointWeights
from reference_model.load import load_weights
from reference_model.model import CausalLM
from reference_model.moe import SparseMoe
from tests.checkpoints import make_tiny
from tests.tolerances import tolerances

LIMIT = tolerances("folding")["node_fp32"]
LAYER = 1
F = 64


def block_of(weights: CheckpointWeights) -> Block:
    """One layer's experts, from codes as they are stored."""
    text = weights.config.text

    def role(kind: Kind, expert: int | None = None) -> TensorRole:
        return TensorRole(section=Section.TEXT, kind=kind, layer=LAYER, expert=expert)

    packed = {
        kind: [pack(weights.quantized(role(kind, expert))) for expert in range(text.stored_experts)]
        for kind in (Kind.EXPERT_GATE, Kind.EXPERT_UP, Kind.EXPERT_DOWN)
    }
    return Block(
        router=weights.matrix(role(Kind.ROUTER)).numpy(),
        shared_gate=weights.matrix(role(Kind.SHARED_EXPERT_GATE)).numpy(),
        gate_up=in_turns(stacked(packed[Kind.EXPERT_GATE]), stacked(packed[Kind.EXPERT_UP])),
        down=stacked(packed[Kind.EXPERT_DOWN]),
        top_k=text.num_experts_per_tok,
    )


def run_node(block: Block, x: Tensor) -> Tensor:
    session = onnxruntime.InferenceSession(block_model(block).SerializeToString(), providers=["CPUExecutionProvider"])
    return torch.from_numpy(session.run(None, {"x": x.numpy()})[0])


def reference(weights: CheckpointWeights, x: Tensor) -> Tensor:
    with torch.device("meta"):
        model = CausalLM(weights.config.text)
    load_weights(model, weights, torch.float64)
    mlp = model.layers[LAYER].mlp
    assert isinstance(mlp, SparseMoe)
    with torch.no_grad():
        return mlp(x.double())[0]


@pytest.mark.parametrize("shared", [F, 2 * F, F // 2, 3 * F // 2])
@pytest.mark.parametrize("tokens", [1, 23])
def test_the_node_computes_the_block(tmp_path: Path, shared: int, tokens: int) -> None:
    make_tiny(tmp_path / "src", layers=2, experts=5, shared=shared)
    policy = default_policy(int4(32), rules=preset_rules("fusable", int4(32)))
    convert(tmp_path / "src", tmp_path / "folded", policy, fold=True)
    with CheckpointWeights.open(tmp_path / "folded") as weights:
        x = torch.randn(tokens, weights.config.text.hidden_size, generator=torch.Generator().manual_seed(5))
        block, expected = block_of(weights), reference(weights, x)
        bound = LIMIT * max(1.0, float(expected.abs().max()))
        assert float((run_node(block, x) - expected).abs().max()) <= bound
        closed = replace(block, shared_gate=np.zeros_like(block.shared_gate))
        assert float((run_node(closed, x) - expected).abs().max()) > 100 * bound
