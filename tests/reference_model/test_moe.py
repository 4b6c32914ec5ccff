"""Routing, experts and the balancing loss."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from transformers.models.qwen3_5_moe.modeling_qwen3_5_moe import load_balancing_loss_func

from reference_model.moe import SparseMoe, combine, dispatch, expert_mlp, load_balancing_loss
from tests.reference_model import tiny
from tests.tolerances import tolerances

LIMITS = tolerances("reference_model")


def block(dtype: torch.dtype = torch.float64) -> SparseMoe:
    return tiny.model(tiny.checkpoint(), dtype).layers[0].mlp


def states(count: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    width = tiny.text_config().hidden_size
    return torch.randn(1, count, width, generator=torch.Generator().manual_seed(seed), dtype=dtype)


@given(st.integers(1, 40), st.integers(1, 5), st.integers(5, 9), st.integers(0, 99))
def test_every_row_goes_to_its_expert_and_comes_back_once(tokens: int, top_k: int, experts: int, seed: int) -> None:
    gen = torch.Generator().manual_seed(seed)
    chosen = torch.stack([torch.randperm(experts, generator=gen)[:top_k] for _ in range(tokens)])
    where = dispatch(chosen, experts)
    owners = torch.repeat_interleave(torch.arange(experts), torch.tensor(where.counts))
    assert torch.equal(chosen[where.token, where.slot], owners)
    assert sorted(zip(where.token.tolist(), where.slot.tolist(), strict=True)) == [
        (t, s) for t in range(tokens) for s in range(top_k)
    ]
    ones = torch.ones(len(owners), 3, dtype=torch.float64)
    weights = torch.rand(tokens, top_k, generator=gen, dtype=torch.float64)
    assert torch.allclose(combine(ones, where, weights), weights.sum(-1, keepdim=True).expand(-1, 3))


def test_permuted_experts_give_the_same_answers() -> None:
    mlp, x = block(), states(30)
    expected, routing = mlp(x)
    order = torch.randperm(7, generator=torch.Generator().manual_seed(1))
    shuffled = block()
    with torch.no_grad():
        for weight in (shuffled.gate.weight, shuffled.experts.gate_up_proj, shuffled.experts.down_proj):
            weight.copy_(weight[order].clone())
    out, moved = shuffled(x)
    assert torch.equal(order[moved.experts], routing.experts)
    assert torch.allclose(out, expected, rtol=0, atol=LIMITS["moe_fp64"])
    with torch.no_grad():  # experts alone, without their router rows: must not be the same
        shuffled.gate.weight.copy_(mlp.gate.weight)
    assert float((shuffled(x)[0] - expected).abs().max()) > LIMITS["visible"]


def test_tokens_do_not_see_each_other() -> None:
    mlp, x = block(), states(30)
    whole, _ = mlp(x)
    order = torch.randperm(30, generator=torch.Generator().manual_seed(1))
    assert torch.allclose(mlp(x[:, order])[0], whole[:, order], rtol=0, atol=LIMITS["moe_fp64"])
    assert torch.allclose(mlp(x[:, 4:5])[0], whole[:, 4:5], rtol=0, atol=LIMITS["moe_fp64"])


def test_gate_rows_come_first() -> None:
    gate, up, down = torch.tensor([[2.0]]), torch.tensor([[-3.0]]), torch.tensor([[5.0]])
    out = expert_mlp(torch.ones(1, 1), torch.cat((gate, up)), down)
    assert float(out) == pytest.approx(5 * (2 / (1 + torch.e**-2)) * -3)


def test_weights_sum_to_one_and_are_sorted() -> None:
    _, routing = block()(states(30))
    assert torch.allclose(routing.weights.sum(-1), torch.ones(30, dtype=torch.float64))
    assert bool((routing.weights.diff(dim=-1) <= 0).all())
    assert torch.equal(routing.experts, routing.logits.topk(3).indices)


def test_an_expert_that_no_token_reaches_is_neither_run_nor_trained() -> None:
    mlp, x = block(torch.float32).requires_grad_(), states(5, dtype=torch.float32)
    with torch.no_grad():
        mlp.experts.gate_up_proj[0] = torch.nan
        mlp.gate.weight[0] = -mlp.gate.weight[1:].mean(0)
        x += 3 * mlp.gate.weight[1:].mean(0)
    out, routing = mlp(x)
    assert not bool((routing.experts == 0).any())
    out.sum().backward()
    assert bool(out.isfinite().all())
    assert mlp.experts.gate_up_proj.grad is not None
    assert not mlp.experts.gate_up_proj.grad[0].any()


def test_the_same_input_gives_the_same_bits() -> None:
    mlp, x = block(torch.float32), states(300, dtype=torch.float32)
    assert torch.equal(mlp(x)[0], mlp(x)[0])


def test_the_balancing_loss_equals_that_of_transformers() -> None:
    logits = [torch.randn(50, 7, generator=torch.Generator().manual_seed(n)) for n in range(3)]
    ours, theirs = load_balancing_loss(logits, 3), load_balancing_loss_func(tuple(logits), 7, 3)
    assert float(ours) == pytest.approx(float(theirs), rel=LIMITS["balancing_loss"])
    assert float(load_balancing_loss([torch.zeros(50, 7)], 3)) == pytest.approx(3.0)
    one = torch.full((50, 7), -1e4)
    one[:, 2] = 0
    assert float(load_balancing_loss([one], 1)) == pytest.approx(7.0)


def test_the_balancing_loss_trains_the_router() -> None:
    logits = torch.randn(50, 7, generator=torch.Generator().manual_seed(0)).requires_grad_()
    load_balancing_loss([logits], 3).backward()
    assert logits.grad is not None
    assert bool(logits.grad.any())


@pytest.mark.parametrize("rows", [1, 7, 8, 9, 16, 23])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_an_expert_computes_its_formula_for_any_number_of_rows(rows: int, dtype: torch.dtype) -> None:
    gen = torch.Generator().manual_seed(rows)
    x, gate, up, down = (
        torch.randn(shape, generator=gen, dtype=torch.float64) for shape in ((rows, 5), (3, 5), (3, 5), (5, 3))
    )
    seen: list[torch.Size] = []

    def halve(values: Tensor) -> Tensor:
        seen.append(values.shape)
        return values / 2

    expected = torch.nn.functional.silu(x / 2 @ gate.T) * (x / 2 @ up.T) / 2 @ down.T
    out = expert_mlp(x.to(dtype), torch.cat((gate, up)).to(dtype), down.to(dtype), halve, halve)
    limit = LIMITS["moe_fp64"] if dtype == torch.float64 else LIMITS["fp32_to_upstream"]
    assert float((out - expected).abs().max() / expected.abs().max().clamp(min=1)) <= limit
    assert seen == [(rows, 5), (rows, 3)]  # what rounds a token's numbers sees tokens alone, one a row
