"""What is stored of a matrix's inputs rounds them as an engine has it after it has put matrices together."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

import reference_model.moe
from qconvert.core.errors import FormatError
from qconvert.core.scheme import FP8, NVFP4, Activation, Float
from qconvert.numerics.activations import quantize_activations
from qconvert.parity.input_rounding import served_rounding
from qconvert.parity.model import compare_models
from qconvert.plan.policy import Rule
from qconvert.weights.source import CheckpointWeights
from tests.conftest import Converted
from tests.edits import edit_tensors, round_inputs_to_four_bits
from tests.formats.test_other_writers import write
from tests.parity.test_model import BATCHES, scored, textbook_kl, whole
from tests.tolerances import tolerances

LIMITS = tolerances("parity")
FOUR_BITS = Activation(kind="dynamic", grid=Float(kind="e2m1"), group=16)
STATIC = Activation(kind="static", grid=FP8.grid)
MORE = tuple(
    Rule(match=f"text.{match}", scheme=NVFP4, reason="a test")
    for match in (
        "attention.query.output_gate", "attention.query", "attention.key", "attention.value", "attention.output",
        "shared_expert.*",
    )
)  # fmt: skip
E2M1 = torch.tensor([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0])


def over(module: str) -> float:
    """What divides, another for each expert, for gate and up, and for values beside queries and keys."""
    expert = int(module.split(".experts.")[1].split(".")[0]) if ".experts." in module else 0
    part = module.rsplit(".", 1)[1]
    return 40.0 + 3.0 * expert + {"gate_proj": 5.0, "up_proj": 2.0, "down_proj": 7.0, "v_proj": 6.0}.get(part, 1.0)


TAKEN = {
    "mlp.experts.gate_up": 42.0,  # the widest range: of expert 0's up
    "mlp.experts.down": 47.0,
    "shared_expert.gate_proj": 45.0,  # the largest that is stored: of the gate
    "shared_expert.up_proj": 45.0,
    "shared_expert.down_proj": 47.0,
    "self_attn.q_proj": 46.0,  # that of the values
    "self_attn.k_proj": 46.0,
    "self_attn.v_proj": 46.0,
    "self_attn.o_proj": 41.0,
}


def textbook_fp4(x: Tensor, over: float) -> Tensor:
    """The nearest of eight magnitudes, times a scale in e4m3 over what is stored."""
    groups = x.unflatten(-1, (-1, 16))
    scale = (groups.abs().amax(-1, keepdim=True) / 6 * over).clamp(max=448).to(torch.float8_e4m3fn).float() / over
    nearest = (groups.abs().unsqueeze(-1) / scale.unsqueeze(-1) - E2M1).abs().argmin(-1)
    return torch.where(scale > 0, E2M1[nearest] * groups.sign() * scale, 0).flatten(-2)


def test_four_bit_inputs_are_served_as_a_whole_model_computes_them(
    converted: Converted, monkeypatch: pytest.MonkeyPatch
) -> None:
    original, out = converted(NVFP4, rules=MORE)
    round_inputs_to_four_bits(out, over)
    with CheckpointWeights.open(original) as a, CheckpointWeights.open(out) as b:
        found = compare_models(a, b, BATCHES)
    z = scored([whole(original)(ids) for ids in BATCHES])

    def experts(x: Tensor, gate_up: Tensor, down: Tensor) -> Tensor:
        gate, up = functional.linear(textbook_fp4(x, TAKEN["mlp.experts.gate_up"]), gate_up).chunk(2, dim=-1)
        return functional.linear(textbook_fp4(functional.silu(gate) * up, TAKEN["mlp.experts.down"]), down)

    monkeypatch.setattr(reference_model.moe, "expert_mlp", experts)
    model = whole(out)
    for name, module in model.named_modules():
        taken = next((scale for part, scale in TAKEN.items() if name.endswith(part)), None)
        if isinstance(module, nn.Linear) and taken is not None:
            module.register_forward_pre_hook(lambda _, args, scale=taken: (textbook_fp4(args[0], scale),))
    expected = textbook_kl(z, scored([model(ids) for ids in BATCHES]))
    served, plain = found.served.scores.kl, found.plain.scores.kl
    assert np.median(np.abs(served - expected)) < LIMITS["served_kl_median"]
    assert served.mean() == pytest.approx(expected.mean(), rel=LIMITS["served_kl_mean"])
    assert np.abs(served - plain).mean() > LIMITS["served_differs"]


OTHERS = {
    "ModelOpt NVFP4": (FOUR_BITS, "input_scale"),
    "NVFP4 with 4-bit inputs": (FOUR_BITS, "input_global_scale"),
    "ModelOpt FP8": (STATIC, "input_scale"),
    "FP8 by the matrix": (STATIC, "input_scale"),
}


@pytest.mark.parametrize("case", OTHERS)
def test_all_experts_of_a_layer_have_the_widest_range_of_any(tmp_path: Path, case: str) -> None:
    activation, suffix = OTHERS[case]
    write(tmp_path, case)
    drawn: dict[str, Tensor] = {}
    gen = torch.Generator().manual_seed(0)

    def draw(tensors: dict[str, Tensor]) -> None:
        for name in [name for name in tensors if name.endswith(f".{suffix}")]:
            multiplier = torch.rand(tensors[name].shape, generator=gen) * 0.02 + 0.01
            drawn[name] = multiplier
            tensors[name] = multiplier.reciprocal() if suffix == "input_global_scale" else multiplier

    edit_tensors(tmp_path, draw)
    x = torch.randn(7, 32, generator=gen)
    with CheckpointWeights.open(tmp_path) as weights:
        rounding = served_rounding(weights)
    assert rounding is not None
    for layer in range(3):
        for module, parts in (("gate_up_proj", ("gate_proj", "up_proj")), ("down_proj", ("down_proj",))):
            ends = tuple(f".{part}.{suffix}" for part in parts)
            widest = max(drawn[name] for name in drawn if f".layers.{layer}." in name and name.endswith(ends))
            expected = quantize_activations(x, activation, float(widest if activation is STATIC else 1 / widest))
            for expert in (0, 5):
                simulated = rounding(f"layers.{layer}.mlp.experts.{expert}.{module}")
                assert simulated is not None
                # what is stored may be a reciprocal, and that of a reciprocal is an ulp off
                assert torch.allclose(simulated(x), expected, rtol=2.0**-21, atol=0)
    assert rounding("layers.0.mlp.shared_expert.down_proj") is None


@pytest.mark.parametrize("case", OTHERS)
@pytest.mark.parametrize("number", [0.0, -1.0, float("nan"), float("inf")])
def test_a_scale_that_no_inputs_have_is_named(tmp_path: Path, case: str, number: float) -> None:
    suffix = OTHERS[case][1]
    write(tmp_path, case)

    def spoil(tensors: dict[str, Tensor]) -> None:
        name = next(name for name in tensors if name.endswith(f"layers.1.mlp.experts.3.up_proj.{suffix}"))
        tensors[name] = torch.full_like(tensors[name], number)

    edit_tensors(tmp_path, spoil)
    match = rf"layers.1.mlp.experts.3.up_proj: {suffix} holds 1 scales"
    with CheckpointWeights.open(tmp_path) as weights, pytest.raises(FormatError, match=match):
        served_rounding(weights)
