"""Experts of the prediction head are rounded for what the rounded decoder tells it, and the tokens that follow."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from qconvert.convert import convert
from qconvert.core.role import Kind, Section, TensorRole
from qconvert.core.scheme import int4
from qconvert.numerics.gptq import gptq, row_losses
from qconvert.numerics.hessian import blended, factorize
from qconvert.plan.policy import Rule, default_policy
from qconvert.sequential.calibration import Calibration
from qconvert.weights.source import CheckpointWeights
from reference_model.load import load_weights
from reference_model.model import CausalLM
from reference_model.moe import Visits
from tests.checkpoints import make_tiny
from tests.sequential.test_layers import BATCHES, second_moments

SCHEME = int4(32)
POLICY = default_policy(SCHEME, rules=(Rule(match="mtp.expert.*", scheme=SCHEME, reason="all"),))


def told(folder: Path) -> tuple[Tensor, Visits]:
    """What enters the experts of the head [N, D], and the visits, over all batches."""
    caught: list[tuple[Tensor, Visits]] = []
    with CheckpointWeights.open(folder) as weights:
        with torch.device("meta"):
            model = CausalLM(weights.config.text)
        load_weights(model, weights, torch.float32)
    model.mtp.layers[0].mlp.experts.register_forward_pre_hook(lambda module, args: caught.append(args))
    with torch.no_grad():
        for ids in BATCHES:
            model.draft(model(ids).hidden[:, :-1], ids[:, 1:])
    x, visits = (list(part) for part in zip(*caught, strict=True))
    return torch.cat(x), Visits(
        experts=torch.cat([one.experts for one in visits]), weights=torch.cat([one.weights for one in visits])
    )


def test_experts_of_the_head_are_rounded_for_what_it_is_told(tmp_path: Path) -> None:
    source, out = tmp_path / "src", tmp_path / "out"
    make_tiny(source, dtype=torch.float32)
    convert(source, out, POLICY, calibration=Calibration(method="gptq", batches=BATCHES))
    x, visits = told(out)
    seen = x.bfloat16().to(torch.float32)  # what waits for experts waits in 16 bits
    others = []
    with CheckpointWeights.open(source) as original, CheckpointWeights.open(out) as converted:
        for e in range(6):
            chosen = visits.experts == e
            tokens = chosen.any(1)
            if not bool(tokens.any()):
                continue
            factor = factorize(blended(*second_moments(seen[tokens], visits.weights[chosen], seen)))
            for kind in (Kind.EXPERT_GATE, Kind.EXPERT_UP):
                role = TensorRole(section=Section.MTP, kind=kind, layer=0, expert=e)
                w, found = original.matrix(role), converted.quantized(role)
                expected = gptq(w, SCHEME, factor)
                others.append(float((found.codes != expected.quantized.codes).float().mean()))
                loss = float(row_losses(found.dequantize() - w, factor).sum())
                assert loss == pytest.approx(expected.loss, rel=0.05)
    assert len(others) > 6
    # Three layers lie before it whose inputs fall to the other side in 16 bits at times: 0.16; other tokens give 0.39.
    assert sum(others) / len(others) < 0.25
