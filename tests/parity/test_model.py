"""The streamed comparison of two models is the comparison of two whole models."""

from __future__ import annotations

from dataclasses import fields, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

import reference_model.moe
from qconvert.core.scheme import FP8, FP8_BLOCK, INT8, Scheme, int4
from qconvert.parity.input_rounding import served_rounding
from qconvert.parity.layers import LayerScores
from qconvert.parity.logits import TokenScores
from qconvert.parity.model import compare_models
from qconvert.plan.policy import Rule
from qconvert.weights.source import CheckpointWeights
from reference_model.load import load_weights
from reference_model.model import CausalLM, Output
from tests.checkpoints import make_tiny
from tests.conftest import Converted
from tests.tolerances import tolerances

LIMITS = tolerances("parity")


BATCHES = (
    torch.randint(416, (2, 33), generator=torch.Generator().manual_seed(1)),
    torch.randint(416, (1, 20), generator=torch.Generator().manual_seed(2)),
)

ATTENTION_TOO = (
    Rule(match="text.attention.*norm", scheme=None, reason="a vector"),
    Rule(match="text.attention.*", scheme=FP8, reason="a test"),
    Rule(match="text.linear_attention.output", scheme=FP8, reason="a test"),
    Rule(match="text.head", scheme=FP8, reason="a test"),
)


def whole(path: Path) -> CausalLM:
    with CheckpointWeights.open(path) as source:
        with torch.device("meta"):
            model = CausalLM(source.config.text)
        load_weights(model, source, torch.float32)
    return model.requires_grad_(False)


def textbook_kl(ours: Tensor, theirs: Tensor) -> np.ndarray:
    p, q = ours.double().log_softmax(-1), theirs.double().log_softmax(-1)
    kl: np.ndarray = (p.exp() * (p - q)).sum(-1).numpy()
    return kl


def scored(outputs: list[Output]) -> Tensor:
    return torch.cat([output.logits[:, :-1].flatten(0, 1) for output in outputs])


@pytest.mark.parametrize("tie", [False, True])
@pytest.mark.parametrize("scheme", [int4(32), INT8], ids=str)
def test_weights_only_is_two_whole_models(scheme: Scheme, tie: bool, conversions: Converted) -> None:
    original, out = conversions(scheme, tie=tie)
    with CheckpointWeights.open(original) as a, CheckpointWeights.open(out) as b:
        found = compare_models(a, b, BATCHES)
    plain, served = found.plain, found.served
    ours = [whole(original)(ids) for ids in BATCHES]
    theirs = [whole(out)(ids) for ids in BATCHES]
    z, y = scored(ours), scored(theirs)
    targets = torch.cat([ids[:, 1:].flatten() for ids in BATCHES])
    np.testing.assert_allclose(plain.scores.kl, textbook_kl(z, y), atol=LIMITS["kl_abs"], rtol=LIMITS["kl_rel"])
    assert (plain.scores.agree == (z.argmax(-1) == y.argmax(-1)).numpy()).all()
    nll = -z.double().log_softmax(-1).gather(1, targets.unsqueeze(1)).squeeze(1)
    np.testing.assert_allclose(plain.scores.nll_original, nll.numpy(), atol=LIMITS["nll_abs"])
    assert served.scores is plain.scores
    for layer, overlap in enumerate(one.router_overlap for one in plain.layers):
        shared = [
            len(set(mine.tolist()) & set(other.tolist())) / len(mine)
            for a_out, b_out in zip(ours, theirs, strict=True)
            for mine, other in zip(a_out.routings[layer].experts, b_out.routings[layer].experts, strict=True)
        ]
        assert overlap == pytest.approx(np.mean(shared))
    assert plain.layers[0].router_overlap > plain.layers[-1].router_overlap - LIMITS["overlap_noise"]


def textbook_fp8(x: Tensor, group: int | None) -> Tensor:
    """Round each token, or each group of its inputs, to e4m3 with a scale of max / 448."""
    parts = x.unsqueeze(-2) if group is None else x.unflatten(-1, (-1, group))
    scale = parts.abs().amax(-1, keepdim=True).clamp(min=1e-10) / 448
    return ((parts / scale).to(torch.float8_e4m3fn).float() * scale).reshape(x.shape)


@pytest.mark.parametrize(
    ("scheme", "rules"), [(FP8, ()), (FP8, ATTENTION_TOO), (FP8_BLOCK, ())], ids=["fp8", "fp8 and dense", "fp8-block"]
)
def test_as_served_rounds_what_enters_each_quantized_matrix(
    scheme: Scheme, rules: tuple[Rule, ...], conversions: Converted, monkeypatch: pytest.MonkeyPatch
) -> None:
    original, out = conversions(scheme, rules=rules)
    with CheckpointWeights.open(original) as a, CheckpointWeights.open(out) as b:
        found = compare_models(a, b, BATCHES)
    plain, served = found.plain, found.served
    z = scored([whole(original)(ids) for ids in BATCHES])

    group = scheme.activation.group
    monkeypatch.setattr(
        reference_model.moe,
        "expert_mlp",
        lambda x, gate_up, down: functional.linear(
            textbook_fp8(
                torch.mul(
                    functional.silu(functional.linear(textbook_fp8(x, group), gate_up[: len(gate_up) // 2])),
                    functional.linear(textbook_fp8(x, group), gate_up[len(gate_up) // 2 :]),
                ),
                group,
            ),
            down,
        ),
    )
    model = whole(out)
    names = ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj", "linear_attn.out_proj"]
    if rules:
        for name, module in model.named_modules():
            if isinstance(module, nn.Linear) and name.endswith(tuple(names)):
                module.register_forward_pre_hook(lambda _, args: (textbook_fp8(args[0], None),))
    outputs = [model(ids) for ids in BATCHES]
    y = scored(outputs)
    if rules:
        hidden = torch.cat([output.hidden[:, :-1].flatten(0, 1) for output in outputs])
        y = functional.linear(textbook_fp8(hidden, None), model.head_weight)
    expected = textbook_kl(z, y)
    assert np.median(np.abs(served.scores.kl - expected)) < LIMITS["served_kl_median"]
    assert served.scores.kl.mean() == pytest.approx(expected.mean(), rel=LIMITS["served_kl_mean"])
    assert abs(served.scores.kl - plain.scores.kl).mean() > LIMITS["served_differs"]


def test_a_model_does_not_diverge_from_itself(tmp_path: Path) -> None:
    make_tiny(tmp_path / "fused")
    make_tiny(tmp_path / "separate", layout="per-expert", naming="text")
    with CheckpointWeights.open(tmp_path / "fused") as a, CheckpointWeights.open(tmp_path / "separate") as b:
        plain = compare_models(a, b, BATCHES, layers=True).plain
    assert plain.scores.kl.max() <= LIMITS["kl_of_itself"]
    assert plain.scores.agree.all()
    nothing = LayerScores(
        hidden_cosine=1.0, hidden_error=0.0, router_overlap=1.0, router_flips=0.0, router_mass_moved=0.0
    )
    assert {replace(one, state_drift=()) for one in plain.layers} == {nothing}
    assert {drift for one in plain.layers for drift in one.state_drift} == {0.0}


def test_what_waits_on_disk_changes_no_score(conversions: Converted) -> None:
    original, out = conversions(FP8)
    with CheckpointWeights.open(original) as a, CheckpointWeights.open(out) as b:
        roomy, tight = (compare_models(a, b, BATCHES, memory=memory, layers=True) for memory in (None, 0))
    for ours, theirs in ((roomy.plain, tight.plain), (roomy.served, tight.served)):
        assert (ours.layers, ours.forced) == (theirs.layers, theirs.forced)
        for one in fields(TokenScores):
            assert (getattr(ours.scores, one.name) == getattr(theirs.scores, one.name)).all()


def test_weight_only_schemes_round_no_activation(conversions: Converted) -> None:
    for scheme, rounds in ((int4(32), False), (INT8, False), (FP8, True), (FP8_BLOCK, True)):
        with CheckpointWeights.open(conversions(scheme)[1]) as source:
            assert (served_rounding(source) is not None) is rounds


def test_progress_is_told_of_every_layer_and_ends_at_its_total(conversions: Converted) -> None:
    original, out = conversions(FP8)
    told: list[tuple[str, int, int]] = []
    with CheckpointWeights.open(original) as a, CheckpointWeights.open(out) as b:
        compare_models(a, b, BATCHES, lambda phase, done, total: told.append((phase, done, total)))
    phases = list(dict.fromkeys(phase for phase, _, _ in told))
    assert phases == ["layers", "logits"]
    for phase in phases:
        steps = [(done, total) for name, done, total in told if name == phase]
        assert steps == sorted(steps)
        assert steps[-1][0] == steps[-1][1]


@pytest.mark.parametrize(("threads", "memory"), [(3, None), (1, 1 << 10), (2, 1 << 22)])
def test_numbers_follow_neither_threads_nor_memory(threads: int, memory: int | None, conversions: Converted) -> None:
    original, out = conversions(FP8, rules=ATTENTION_TOO)
    found = []
    before = torch.get_num_threads()
    for number, room in ((1, None), (threads, memory)):
        torch.set_num_threads(number)
        try:
            with CheckpointWeights.open(original) as a, CheckpointWeights.open(out) as b:
                found.append(compare_models(a, b, BATCHES, memory=room, layers=True))
            assert torch.get_num_threads() == number
        finally:
            torch.set_num_threads(before)
    for one, other in zip((found[0].plain, found[0].served), (found[1].plain, found[1].served), strict=True):
        assert one.layers == other.layers
        assert (one.forced, one.lens) == (other.forced, other.lens)
        for part in fields(TokenScores):
            np.testing.assert_array_equal(getattr(one.scores, part.name), getattr(other.scores, part.name))
