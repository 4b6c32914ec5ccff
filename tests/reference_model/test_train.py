"""Training lowers the loss, the same way every time, however it is shared out or interrupted."""

from __future__ import annotations

import itertools
import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from reference_model.model import CausalLM
from reference_model.moe import load_balancing_loss
from reference_model.train import Losses, Muon, Recipe, expert_shares, losses, optimizers, orthogonalize, start, train
from tests.reference_model.tiny import text_config, tokens
from tests.tolerances import tolerances

LIMITS = tolerances("training")


RECIPE = Recipe(
    steps=6, decay=3, warmup=2, matrix_rate=0.02, embedding_rate=0.05, head_rate=0.01, other_rate=0.01
)  # fmt: skip


def fresh(seed: int = 0, **changes: Any) -> CausalLM:
    model = CausalLM(text_config(**{"mtp_num_hidden_layers": 1, **changes}))
    start(model, seed)
    return model


def same(a: CausalLM, b: CausalLM) -> bool:
    return all(torch.equal(p, q) for p, q in zip(a.parameters(), b.parameters(), strict=True))


def test_a_batch_is_learned_and_twice_gives_the_same_weights() -> None:
    batch = tokens(4, 40)
    runs = []
    for _ in range(2):
        model = fresh()
        reports = list(train(model, itertools.repeat(batch), replace(RECIPE, steps=12)))
        assert reports[-1].next_token < LIMITS["learned"] * reports[0].next_token
        assert reports[-1].draft < LIMITS["draft_learned"] * reports[0].draft
        assert [report.step for report in reports] == list(range(12))
        runs.append(model)
    assert same(*runs)


def test_two_workers_take_the_same_steps_as_one() -> None:
    batch = tokens(4, 24)
    models = []
    for workers in (1, 2):
        model = fresh()
        # The balancing loss is no sum over windows; without it the gradients are equal up to rounding.
        recipe = replace(RECIPE, steps=1, balance_weight=0.0)
        (report,) = train(model, [batch], recipe, workers=workers)
        models.append((report.next_token, dict(model.named_parameters())))
    (one_loss, one), (two_loss, two) = models
    assert math.isclose(one_loss, two_loss, rel_tol=LIMITS["two_workers_loss"])
    moved = [(one[name] - two[name]).abs().max() for name in one if name.endswith("_proj.weight")]
    assert max(moved) < LIMITS["two_workers_step"]


def test_a_resumed_run_ends_where_an_unbroken_one_does() -> None:
    batches = [tokens(2, 24, seed) for seed in range(RECIPE.steps)]
    whole = fresh()
    list(train(whole, batches, RECIPE, workers=2))
    broken = fresh()
    for report in train(broken, batches, RECIPE, workers=2):
        if report.step == 2:
            state = {**report.state(), "model": {k: v.clone() for k, v in broken.state_dict().items()}}
            state["optimizers"] = [torch.utils._pytree.tree_map(_copy, saved) for saved in state["optimizers"]]
            break
    later = fresh(seed=1)
    reports = list(train(later, batches[3:], RECIPE, workers=2, resume=state))
    assert [report.step for report in reports] == [3, 4, 5]
    assert same(whole, later)


def _copy(leaf: object) -> object:
    return leaf.clone() if isinstance(leaf, Tensor) else leaf


def test_windows_that_cannot_be_shared_out_are_an_error() -> None:
    with pytest.raises(ValueError, match="3 windows cannot be shared out to 2 workers"):
        list(train(fresh(), [tokens(3, 8)], RECIPE, workers=2))


def test_a_loss_that_is_not_finite_stops_the_run() -> None:
    model = fresh()
    with torch.no_grad():
        model.norm.weight.fill_(math.nan)
    with pytest.raises(RuntimeError, match="step 0"):
        list(train(model, [tokens(2, 8)], RECIPE))


def test_losses_are_those_of_the_definition() -> None:
    model, ids = fresh(), tokens(2, 12)
    measured = losses(model, ids)
    output = model(ids)
    draft = model.head(model.draft(output.hidden[:, :-1], ids[:, 1:]).hidden)
    nats = [-output.logits[b, t].log_softmax(-1)[ids[b, t + 1]] for b in range(2) for t in range(11)]
    ahead = [-draft[b, t].log_softmax(-1)[ids[b, t + 2]] for b in range(2) for t in range(10)]
    torch.testing.assert_close(measured.next_token, torch.stack(nats).mean())
    torch.testing.assert_close(measured.draft, torch.stack(ahead).mean())
    layers = [*output.routings, *model.draft(output.hidden[:, :-1], ids[:, 1:]).routings]
    each = [load_balancing_loss([layer.logits], model.config.num_experts_per_tok) for layer in layers]
    torch.testing.assert_close(measured.balance, torch.stack(each).mean())
    parts = Losses(next_token=torch.tensor(3.0), draft=torch.tensor(5.0), balance=torch.tensor(7.0))
    assert parts.total(replace(RECIPE, draft_weight=0.5, balance_weight=0.1)).item() == pytest.approx(6.2)


def test_a_model_without_a_prediction_head_trains_too() -> None:
    model = fresh(mtp_num_hidden_layers=0)
    (report,) = train(model, [tokens(2, 16)], replace(RECIPE, steps=1))
    assert report.draft == 0.0


def test_rates_rise_stay_and_fall_to_zero() -> None:
    recipe = replace(RECIPE, steps=10, decay=4, warmup=2)
    assert [recipe.rate(step) for step in range(11)] == [0.5, 1, 1, 1, 1, 1, 1, 0.75, 0.5, 0.25, 0]


@pytest.mark.parametrize("shape", [(5, 8), (8, 5), (3, 6, 4), (2, 3, 4, 7)])
def test_orthogonalize_keeps_directions_and_evens_singular_values(shape: tuple[int, ...]) -> None:
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    left, _, right = torch.linalg.svd(x, full_matrices=False)
    among = left.mT @ orthogonalize(x, rounds=8) @ right.mT
    values = among.diagonal(dim1=-2, dim2=-1)
    assert (values > LIMITS["singular_min"]).all() and (values < LIMITS["singular_max"]).all()
    assert (among - torch.diag_embed(values)).abs().max() <= LIMITS["singular_mixed"]


def test_orthogonalize_leaves_zero_alone() -> None:
    assert not orthogonalize(torch.zeros(2, 3, 4)).any()


def test_muon_takes_matrices_that_share_rows_apart() -> None:
    generator = torch.Generator().manual_seed(0)
    gate, up = (torch.randn(2, 3, 5, generator=generator) for _ in range(2))
    apart = [torch.nn.Parameter(part.clone()) for part in (gate, up)]
    together = torch.nn.Parameter(torch.cat((gate, up), dim=1))
    gradients = [torch.randn(2, 3, 5, generator=generator) for _ in range(2)]
    for weight, gradient in zip((*apart, together), (*gradients, torch.cat(gradients, dim=1)), strict=True):
        weight.grad = gradient
    Muon([{"params": apart}, {"params": [together], "parts": 2}], 0.1).step()
    torch.testing.assert_close(together.detach(), torch.cat([part.detach() for part in apart], dim=1))
    assert not torch.equal(apart[0].detach(), gate)


def test_every_weight_has_one_optimizer() -> None:
    model = fresh()
    groups = [group for share in optimizers(model, RECIPE, 3) for each in share for group in each.param_groups]
    owned = [id(weight) for group in groups for weight in group["params"]]
    assert sorted(owned) == sorted(id(weight) for weight in model.parameters())
    stacked = {id(weight) for name, weight in model.named_parameters() if name.endswith("gate_up_proj")}
    for group in groups:
        if group.get("parts", 1) == 2:
            stacked -= {id(weight) for weight in group["params"]}
    assert not stacked


def test_start_is_a_model_that_says_nothing_yet() -> None:
    model, ids = fresh(), tokens(2, 70)
    assert same(model, fresh())
    assert not same(model, fresh(seed=1))
    output = model(ids)
    torch.testing.assert_close(output.logits, model.head(model.norm(model.embed_tokens(ids))))
    for layer in model.layers:
        if layer.layer_type == "linear_attention":
            memory = torch.nn.functional.softplus(layer.linear_attn.dt_bias)
            assert ((memory > 0.9e-3) & (memory < 0.11)).all()
            assert ((layer.linear_attn.A_log >= 0) & (layer.linear_attn.A_log <= math.log(16))).all()
            assert (layer.linear_attn.norm.weight == 1).all()
        else:
            assert not layer.self_attn.q_norm.weight.any()


def test_shares_count_every_visit() -> None:
    model, ids = fresh(), tokens(3, 20)
    shares = expert_shares(model, [ids[:2], ids[2:]])
    torch.testing.assert_close(shares.sum(-1), torch.ones(4, dtype=shares.dtype))
    for layer, routing in enumerate(model(ids).routings):
        for expert in range(7):
            assert shares[layer, expert].item() == pytest.approx((routing.experts == expert).sum().item() / (60 * 3))
