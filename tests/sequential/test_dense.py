"""Attention, delta rule, shared expert and head are rounded for what reaches them, recomputed as for experts."""

from __future__ import annotations

from collections import defaultdict
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from qconvert.arch.names import Naming, module_of, name_of
from qconvert.convert import convert
from qconvert.core.role import Kind, Section
from qconvert.core.scheme import int4
from qconvert.numerics.gptq import gptq, row_losses
from qconvert.numerics.hessian import blended, factorize, no_moments
from qconvert.sequential.calibration import Calibration
from qconvert.weights.source import CheckpointWeights
from reference_model.load import load_weights
from reference_model.model import CausalLM
from reference_model.moe import SparseMoe
from tests.checkpoints import make_tiny
from tests.sequential.test_going_on import POLICY

IDS = torch.from_numpy(np.random.default_rng(3).integers(0, 400, (8, 48)))
BATCHES = torch.split(IDS, 2)


def dense_inputs(folder: Path) -> dict[str, Tensor]:
    """What each linear module of a checkpoint reads over all batches, [N, K] by name, shared experts by their gates."""
    caught: defaultdict[str, list[Tensor]] = defaultdict(list)
    with CheckpointWeights.open(folder) as weights:
        with torch.device("meta"):
            model = CausalLM(weights.config.text)
        load_weights(model, weights, torch.float32)
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear):
            module.register_forward_pre_hook(lambda _, args, name=name: caught[name].append(args[0].flatten(0, -2)))
    model.norm.register_forward_hook(lambda _, args, out: caught["lm_head"].append(out.flatten(0, -2)))
    with torch.no_grad():
        for ids in BATCHES:
            model(ids)
        found = {name: torch.cat(rows) for name, rows in caught.items() if name != "lm_head"}
        found["lm_head"] = torch.cat([rows for rows in caught["lm_head"] if len(rows) == BATCHES[0].numel()])
        for name in [name for name in found if name.endswith("shared_expert_gate")]:
            block = model.get_submodule(name.removesuffix(".shared_expert_gate"))
            assert isinstance(block, SparseMoe) and block.shared_expert is not None
            seen = found[name].bfloat16().to(torch.float32)  # what waits for experts waits in 16 bits
            share = torch.sigmoid(block.shared_expert_gate(seen))
            share /= share.square().mean().sqrt()
            shared, to = block.shared_expert, name.removesuffix("_gate")
            inner = functional.silu(shared.gate_proj(seen)) * shared.up_proj(seen)
            found |= {f"{to}.{part}_proj": seen * share for part in ("gate", "up")}
            found[f"{to}.down_proj"] = inner * share
    return found


@pytest.mark.parametrize("propagate", [True, False], ids=["propagated", "the original's"])
def test_what_every_token_passes_is_rounded_for_what_it_reads(tmp_path: Path, propagate: bool) -> None:
    source, out = tmp_path / "src", tmp_path / "out"
    make_tiny(source, dtype=torch.float32)
    convert(source, out, POLICY, calibration=Calibration(method="gptq", batches=BATCHES, propagate=propagate))
    inputs = dense_inputs(out if propagate else source)
    kinds = set()
    with CheckpointWeights.open(source) as original, CheckpointWeights.open(out) as converted:
        for role in converted.stored:
            if converted.scheme(role) is None or role.expert is not None or role.section is Section.MTP:
                continue
            module = module_of(name_of(role, Naming.TEXT)).removeprefix("model.")
            factor = factorize(blended(no_moments(inputs[module].shape[1]).add(inputs[module])))
            w, found = original.matrix(role), converted.quantized(role)
            expected = gptq(w, int4(32), factor)
            other = float((found.codes != expected.quantized.codes).float().mean())
            # The first layer's are the same; behind it an input of experts falls to the other side in 16 bits at times.
            assert other < (0.001 if role.layer == 0 else 0.15), (role, other)
            assert float(row_losses(found.dequantize() - w, factor).sum()) == pytest.approx(expected.loss, rel=0.02)
            kinds.add(role.kind)
    assert kinds >= {Kind.ATTENTION_OUTPUT, Kind.LINEAR_OUTPUT, Kind.LINEAR_QKV, Kind.SHARED_DOWN, Kind.HEAD}
