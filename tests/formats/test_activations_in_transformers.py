"""What transformers does to activations before matrices whose both sides are rounded, beside what we simulate.

Both sides of each comparison are transformers' own forward pass over the same weights: once with its rounding, once
with ours put in front of the same modules. So they are equal to the bit, or the rule is another one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import bitsandbytes
import pytest
import torch
import transformers
from torch import Tensor, nn

from qconvert.cli.demo import CHECKPOINT
from qconvert.convert import convert
from qconvert.core.scheme import FP8, FP8_BLOCK, LLM_INT8, NVFP4, W8A8, Activation, Int, Scheme
from qconvert.numerics.activations import quantize_activations
from qconvert.parity.windows import HELD_OUT
from qconvert.plan.policy import Policy, Rule, default_policy
from qconvert.plan.presets import preset_rules
from tests.checkpoints import make_tiny
from tests.edits import round_inputs_to_four_bits
from tests.tolerances import tolerances

Simulated = Callable[[Tensor], Tensor]

LIMITS = tolerances("conversion")
ALWAYS_ACTIVE = preset_rules("mixed", FP8)
KEEP_EXPERTS = Rule(match="text.expert.*", scheme=None, reason="transformers has them in 16 bits, whatever is stored")
SCHEMES: dict[str, tuple[Scheme, str | None]] = {
    "w8a8": (W8A8, None),
    "fp8": (FP8, None),
    "fp8 tiles": (FP8_BLOCK, "compressed-tensors"),
}
BNB_CONSTANT = 6.200124e-05
"""What bitsandbytes 0.50 has for 1 / 127^2, which is 6.200012e-05."""


def policy(scheme: Scheme, method: str | None = None, *, attention: bool = True) -> Policy:
    """Everything that is always active in ``scheme``; tiles do not divide every checkpoint's attention."""
    rules = [rule for rule in preset_rules("mixed", scheme) if attention or not rule.match.startswith("text.attention")]
    made = default_policy(scheme, rules=(KEEP_EXPERTS, *rules))
    return made if method is None else made.stored_as(method)


@pytest.fixture(scope="module")
def real_heads(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random checkpoint whose heads are as wide as those of the published models."""
    path = tmp_path_factory.mktemp("real") / "src"
    make_tiny(path, group=128, real_heads=True, naming="text", layers=2)
    return path


def loaded(path: Path, ids: Tensor) -> Any:
    """transformers' model, widened to float32; packed matrices become dense in the first forward pass."""
    model = transformers.AutoModelForCausalLM.from_pretrained(
        path, dtype=torch.bfloat16, experts_implementation="eager"
    )
    logits(model, ids)
    return nn.Module.float(model)


@torch.no_grad()
def logits(model: Any, ids: Tensor) -> Tensor:
    scores: Tensor = model(ids).logits.double().log_softmax(-1)
    return scores


def kl(p: Tensor, q: Tensor) -> float:
    return float((p.exp() * (p - q)).sum(-1).mean())


def quantized_modules(model: Any) -> dict[str, Any]:
    return {name: one for name, one in model.named_modules() if getattr(one, "quantization_scheme", None) is not None}


@contextmanager
def ours_instead(modules: dict[str, Any], simulated: Simulated) -> Iterator[None]:
    """Put ``simulated`` before the modules, whose own rounding is switched off."""
    hooks = [one.register_forward_pre_hook(lambda _, given: simulated(given[0])) for one in modules.values()]
    for one in modules.values():
        one.quantization_enabled = False
    yield
    for one, hook in zip(modules.values(), hooks, strict=True):
        hook.remove()
        one.quantization_enabled = True


def as_compressed_tensors(activation: Activation) -> Simulated:
    """Its rule: tokens have scales of their own in [B, T, K], and one together in [T, K]; int8's is amax / 127.5."""

    def rounded(x: Tensor) -> Tensor:
        if activation.group is not None:
            return quantize_activations(x, activation)
        largest = x.abs().amax(dim=-1, keepdim=True) if x.dim() == 3 else x.abs().amax()
        if isinstance(activation.grid, Int):
            scale = largest / 127.5
            return (x / scale).round().clamp(-128, 127) * scale
        scale = largest / 448
        return (x / scale).clamp(-448, 448).to(torch.float8_e4m3fn).float() * scale

    return rounded


def as_served(activation: Activation) -> Simulated:
    return lambda x: quantize_activations(x, activation)


def some_ids(vocabulary: int) -> Tensor:
    return torch.randint(vocabulary, (2, 40), generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("name", SCHEMES)
def test_the_rule_of_compressed_tensors_is_known_to_the_bit(real_heads: Path, tmp_path: Path, name: str) -> None:
    scheme, method = SCHEMES[name]
    convert(real_heads, tmp_path / "out", policy(scheme, method))
    ids = some_ids(400)
    model = loaded(tmp_path / "out", ids)
    modules = quantized_modules(model)
    theirs = logits(model, ids)
    with ours_instead(modules, lambda x: x):
        assert kl(logits(model, ids), theirs) > 100 * LIMITS["kl_to_transformers"]  # rounding shows
    with ours_instead(modules, as_compressed_tensors(scheme.activation)):
        assert torch.equal(logits(model, ids), theirs)
    attention = {at: one for at, one in modules.items() if ".shared_expert." not in at}
    same = attention if scheme is FP8 else modules if scheme is FP8_BLOCK else {}
    with ours_instead(same, as_served(scheme.activation)):  # what we simulate is the same rule there
        assert torch.equal(logits(model, ids), theirs)


def test_four_bit_inputs_are_rounded_by_the_same_rule(real_heads: Path, tmp_path: Path) -> None:
    """NVFP4 as others write it; transformers has each matrix's own scale of inputs, and here all have the same."""
    gate = Rule(match="text.attention.query.output_gate", scheme=NVFP4, reason="by name, or it is refused")
    policy = default_policy(NVFP4, rules=(KEEP_EXPERTS, gate, *(replace(rule, scheme=NVFP4) for rule in ALWAYS_ACTIVE)))
    convert(real_heads, tmp_path / "out", policy)
    over = 448.0 * 6.0 / 16.0
    round_inputs_to_four_bits(tmp_path / "out", lambda module: over)
    ids = some_ids(400)
    model = loaded(tmp_path / "out", ids)
    modules = quantized_modules(model)
    theirs = logits(model, ids)
    with ours_instead(modules, lambda x: x):
        assert kl(logits(model, ids), theirs) > 100 * LIMITS["kl_to_transformers"]  # rounding shows
    activation = Activation(kind="dynamic", grid=NVFP4.grid, group=16)
    with ours_instead(modules, lambda x: quantize_activations(x, activation, over)):
        assert torch.equal(logits(model, ids), theirs)


@pytest.mark.parametrize("name", SCHEMES)
def test_the_rules_cost_about_the_same_on_trained_weights(tmp_path: Path, name: str) -> None:
    scheme, method = SCHEMES[name]
    convert(CHECKPOINT, tmp_path / "out", policy(scheme, method, attention=scheme is not FP8_BLOCK))
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    ids = torch.tensor([tokenizer((HELD_OUT / "code.txt").read_text())["input_ids"][:256]])
    model = loaded(tmp_path / "out", ids)
    theirs = logits(model, ids)
    with ours_instead(quantized_modules(model), as_served(scheme.activation)):
        found = kl(logits(model, ids), theirs)
    assert found <= LIMITS[f"kl_of_rules_{name.replace(' ', '_')}"]


def test_tiles_of_the_fp8_method_round_no_activations_without_a_gpu(real_heads: Path, tmp_path: Path) -> None:
    convert(real_heads, tmp_path / "out", policy(FP8_BLOCK))
    model = loaded(tmp_path / "out", some_ids(400))
    assert quantized_modules(model) == {}
    assert {type(one) for one in model.modules() if isinstance(one, nn.Linear)} == {nn.Linear}


def as_bitsandbytes(x: Tensor, threshold: float) -> Tensor:
    """Columns in which any token is beyond the threshold stay; others are int8 per token, of inputs cast to F16."""
    half = x.half()
    beyond = half.abs() >= threshold
    columns = beyond.flatten(0, -2).any(dim=0)
    rest = half.masked_fill(beyond, 0)
    scale = rest.abs().amax(dim=-1, keepdim=True).float()
    return torch.where(columns, x, (rest * (127 / scale)).round() * scale * (BNB_CONSTANT * 127))


@torch.no_grad()
@pytest.mark.parametrize("outliers", [False, True])
def test_llm_int8_is_what_we_simulate_but_for_outliers(real_heads: Path, tmp_path: Path, outliers: bool) -> None:
    convert(real_heads, tmp_path / "out", policy(LLM_INT8))
    model = loaded(tmp_path / "out", some_ids(400))
    modules = {name: one for name, one in model.named_modules() if isinstance(one, bitsandbytes.nn.Linear8bitLt)}
    assert len(modules) > 10
    for seed, (name, one) in enumerate(modules.items()):
        x = torch.randn(2, 9, one.in_features, generator=torch.Generator().manual_seed(seed)).half().float()
        if outliers:
            x[1, 4, 7] = -9.0
        matrix = one.state.CB.float() * one.state.SCB[:, None] / 127
        theirs = one(x)
        largest = float(theirs.abs().max())
        exact = nn.functional.linear(as_bitsandbytes(x, threshold=6.0), matrix)
        assert float((theirs - exact).abs().max()) <= LIMITS["bitsandbytes_fp32"] * largest, name
        ours = nn.functional.linear(quantize_activations(x, LLM_INT8.activation), matrix)
        far = float((theirs - ours).abs().max()) / largest
        assert far > LIMITS["bitsandbytes_outliers"] if outliers else far <= LIMITS["bitsandbytes_simulated"], name
