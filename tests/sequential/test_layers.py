"""Every matrix is rounded for what reaches it in the model that is written: recomputed from that, outside."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional

from qconvert.convert import convert
from qconvert.core.role import Kind, Section, TensorRole
from qconvert.core.scheme import int4
from qconvert.numerics.gptq import gptq, row_losses
from qconvert.numerics.hessian import Moments, blended, factorize, no_moments
from qconvert.plan.policy import default_policy
from qconvert.sequential.calibration import Calibration
from qconvert.weights.source import CheckpointWeights
from reference_model.load import load_weights
from reference_model.model import CausalLM
from reference_model.moe import Visits
from tests.checkpoints import make_tiny

SCHEME = int4(32)
BATCHES = tuple(torch.from_numpy(np.random.default_rng(3).integers(0, 400, (4, 24))).split(2))
LAYERS = (0, 1, 2)


@pytest.fixture(scope="module", params=[True, False], ids=["propagated", "the original's"])
def made(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, bool]:
    folder = tmp_path_factory.mktemp("layers")
    make_tiny(folder / "src", dtype=torch.float32)
    calibration = Calibration(method="gptq", batches=BATCHES, propagate=request.param)
    convert(folder / "src", folder / "out", default_policy(SCHEME), calibration=calibration)
    return folder / "src", folder / "out", request.param


def expert_inputs(folder: Path) -> list[tuple[Tensor, Visits]]:
    """What enters the experts of each layer of a checkpoint: x [N, D] and the visits, over all batches."""
    caught: list[list[tuple[Tensor, Visits]]] = [[] for _ in LAYERS]
    with CheckpointWeights.open(folder) as weights:
        with torch.device("meta"):
            model = CausalLM(weights.config.text)
        load_weights(model, weights, torch.float32)
    for n in LAYERS:
        model.layers[n].mlp.experts.register_forward_pre_hook(lambda module, args, n=n: caught[n].append(args))
    with torch.no_grad():
        for ids in BATCHES:
            model(ids)
    return [
        (
            torch.cat([x for x, _ in found]),
            Visits(
                experts=torch.cat([visits.experts for _, visits in found]),
                weights=torch.cat([visits.weights for _, visits in found]),
            ),
        )
        for found in caught
    ]


def second_moments(rows: Tensor, counts: Tensor, layer: Tensor) -> tuple[Moments, Moments]:
    own = no_moments(rows.shape[1]).add(rows * (counts / counts.square().mean().sqrt())[:, None])
    return own, no_moments(rows.shape[1]).add(layer)


def test_experts_are_rounded_for_the_tokens_that_reach_them(made: tuple[Path, Path, bool]) -> None:
    source, out, propagate = made
    others: list[list[float]] = [[] for _ in LAYERS]
    with CheckpointWeights.open(source) as original, CheckpointWeights.open(out) as converted:
        for n, (x, visits) in enumerate(expert_inputs(out if propagate else source)):
            seen = x.bfloat16().to(torch.float32)  # what waits for experts waits in 16 bits
            for e in range(6):
                chosen = visits.experts == e
                tokens = chosen.any(1)
                if not bool(tokens.any()):
                    continue
                counts = visits.weights[chosen]
                shown = converted if propagate else original

                def role(kind: Kind, n: int = n, e: int = e) -> TensorRole:
                    return TensorRole(section=Section.TEXT, kind=kind, layer=n, expert=e)

                gate, up = (shown.matrix(role(kind)) for kind in (Kind.EXPERT_GATE, Kind.EXPERT_UP))

                def inner(rows: Tensor, gate: Tensor = gate, up: Tensor = up) -> Tensor:
                    return functional.silu(rows @ gate.T) * (rows @ up.T)

                sample = seen[torch.arange(64) * len(seen) // 64]
                inputs = {
                    Kind.EXPERT_GATE: (seen[tokens], seen),
                    Kind.EXPERT_UP: (seen[tokens], seen),
                    Kind.EXPERT_DOWN: (inner(seen[tokens]), inner(sample)),
                }
                for kind, (rows, layer) in inputs.items():
                    factor = factorize(blended(*second_moments(rows, counts, layer)))
                    w = original.matrix(role(kind))
                    expected = gptq(w, SCHEME, factor)
                    found = converted.quantized(role(kind))
                    others[n].append(float((found.codes != expected.quantized.codes).float().mean()))
                    loss = float(row_losses(found.dequantize() - w, factor).sum())
                    assert loss == pytest.approx(expected.loss, rel=0.03)
    # Sums in another order move an input over the middle between two numbers of 16 bits now and then, and codes after
    # it. Inputs of the other model give 0.23 and 0.30 where these give 0.03 and 0.07.
    assert [max(others[0]) == 0.0, *(sum(of) / len(of) < 0.12 for of in others[1:])] == [True] * 3
    assert sum(map(len, others)) > 30


def test_it_is_not_what_rounding_to_nearest_gives(made: tuple[Path, Path, bool], tmp_path: Path) -> None:
    source, out, _ = made
    convert(source, tmp_path / "rtn", default_policy(SCHEME, search=True))
    with CheckpointWeights.open(tmp_path / "rtn") as nearest, CheckpointWeights.open(out) as converted:
        for role in converted.stored:
            if converted.scheme(role) is not None:
                other = converted.quantized(role).codes != nearest.quantized(role).codes
                assert float(other.float().mean()) > 0.02, role
