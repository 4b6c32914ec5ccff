"""Inputs of a trained model's experts on held-out text: what calibration sees, and other text to judge it by."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor
from torch.nn import functional

from qconvert.cli.demo import CHECKPOINT
from qconvert.parity.windows import HELD_OUT, text_windows
from qconvert.texts.documents import Text
from qconvert.weights.source import CheckpointWeights
from reference_model.load import load_weights
from reference_model.model import CausalLM
from reference_model.moe import Visits


@dataclass(frozen=True, slots=True, kw_only=True)
class Inputs:
    """What enters a block of experts: ``x`` [T, D], and who goes to which expert, bool [T, E]."""

    x: Tensor
    visited: Tensor


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainedExpert:
    """One expert, [F, D], [F, D] and [D, F], and its layer's inputs twice: to calibrate with, and to be judged by."""

    index: int
    gate: Tensor
    up: Tensor
    down: Tensor
    seen: Inputs
    unseen: Inputs

    def rows(self, inputs: Inputs) -> Tensor:
        """The tokens that come to this expert, [T, D]."""
        return inputs.x[inputs.visited[:, self.index]]

    def inner(self, x: Tensor) -> Tensor:
        """What enters ``down`` for tokens ``x`` [T, D]: [T, F]."""
        return functional.silu(x @ self.gate.T) * (x @ self.up.T)


@cache
def trained_experts(layer: int, tokens: int = 8192) -> tuple[TrainedExpert, ...]:
    """All experts of a layer of the demo checkpoint; even windows of the text are seen, odd ones are not."""
    texts = [Text(name=path.stem, path=path) for path in sorted(HELD_OUT.glob("*.txt"))]
    windows = text_windows(CHECKPOINT, texts, 128, tokens)
    caught: list[Inputs] = []

    def catch(module: torch.nn.Module, arguments: tuple[Tensor, Visits]) -> None:
        x, visits = arguments
        count = model.config.num_experts
        caught.append(Inputs(x=x, visited=functional.one_hot(visits.experts, count).sum(1).bool()))

    with CheckpointWeights.open(CHECKPOINT) as weights:
        with torch.device("meta"):
            model = CausalLM(weights.config.text)
        load_weights(model, weights, torch.float32)
    block = model.layers[layer].mlp.experts
    model.layers = model.layers[: layer + 1]
    ids = torch.cat([batch for batch in windows.batches if batch.shape[1] == 128])
    with torch.no_grad(), block.register_forward_pre_hook(catch):
        for half in (ids[0::2], ids[1::2]):
            model(half)
    seen, unseen = caught
    halves = (pair.chunk(2) for pair in block.gate_up_proj.detach())
    return tuple(
        TrainedExpert(index=e, gate=gate, up=up, down=down, seen=seen, unseen=unseen)
        for e, ((gate, up), down) in enumerate(zip(halves, block.down_proj.detach(), strict=True))
    )
