"""The gated delta rule: chunks equal steps, and both do what the formulas say."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from reference_model.delta_rule import (
    chunked_gated_delta_rule,
    invert_unit_lower,
    l2_normalize,
    recurrent_gated_delta_rule,
)
from tests.tolerances import tolerances

LIMITS = tolerances("reference_model")


def inputs(
    tokens: int, dtype: torch.dtype = torch.float64, seed: int = 0, key_heads: int = 2, groups: int = 3
) -> tuple[Tensor, ...]:
    gen = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=gen, dtype=torch.float64)

    heads = key_heads * groups
    q, k, v = normal(2, tokens, key_heads, 10), normal(2, tokens, key_heads, 10), normal(2, tokens, heads, 14)
    g, beta = -normal(2, tokens, heads).exp(), normal(2, tokens, heads).sigmoid()
    return tuple(x.to(dtype) for x in (q, k, v, g, beta, normal(2, heads, 10, 14)))


def worst(ours: tuple[Tensor, ...], theirs: tuple[Tensor, ...]) -> float:
    """Largest difference relative to the largest value; NaN is infinitely bad."""
    pairs = ((a.double(), b.double()) for a, b in zip(ours, theirs, strict=True))
    return max(float(((a - b).abs().max() / b.abs().max().clamp(min=1e-9)).nan_to_num(torch.inf)) for a, b in pairs)


@given(
    tokens=st.integers(1, 150),
    key_heads=st.integers(1, 3),
    groups=st.integers(1, 3),
    seed=st.integers(0, 99),
    started=st.booleans(),
)
def test_chunks_equal_steps(tokens: int, key_heads: int, groups: int, seed: int, started: bool) -> None:
    *x, state = inputs(tokens, seed=seed, key_heads=key_heads, groups=groups)
    start = state if started else None
    limit = LIMITS["rule_fp64"]
    assert worst(chunked_gated_delta_rule(*x, start), recurrent_gated_delta_rule(*x, start)) <= limit


@pytest.mark.parametrize("tokens", [1, 2, 63, 64, 65, 128, 200])
def test_chunks_equal_steps_in_fp32(tokens: int) -> None:
    wide = recurrent_gated_delta_rule(*inputs(tokens))
    assert worst(chunked_gated_delta_rule(*inputs(tokens, torch.float32)), wide) <= LIMITS["rule_fp32"]


@pytest.mark.parametrize("decay", [0.0, -1e-3, -500.0])
def test_repeated_keys_and_extreme_decays_cost_no_precision(decay: float) -> None:
    """One token over and over: the case in which a product of powers of A reaches 1e17 and cancels."""
    q, k, v, g, _, _ = inputs(130, torch.float32)
    q, k = q[:, :1].expand_as(q), k[:, :1].expand_as(k)
    x = q, k, v, torch.full_like(g, decay), torch.full_like(g, 0.999)
    wide = recurrent_gated_delta_rule(*(y.double() for y in x))
    assert worst(chunked_gated_delta_rule(*x), wide) <= LIMITS["rule_fp32"]


@given(st.integers(1, 80), st.integers(0, 1000))
def test_zero_rows_neither_read_nor_write(tokens: int, seed: int) -> None:
    q, k, v, g, beta, state = inputs(tokens, seed=seed)
    dead = torch.rand(2, tokens, generator=torch.Generator().manual_seed(seed)) < 0.5
    q, k = (x.masked_fill(dead[..., None, None], 0.0) for x in (q, k))
    steps = recurrent_gated_delta_rule(q, k, v, g, beta, state)
    assert worst(chunked_gated_delta_rule(q, k, v, g, beta, state), steps) <= LIMITS["rule_fp64"]
    assert not steps[0][dead].any()


def test_all_zero_inputs_give_zeros() -> None:
    zeros = tuple(torch.zeros_like(x) for x in inputs(65, torch.float32))
    for rule in (chunked_gated_delta_rule, recurrent_gated_delta_rule):
        assert all(not x.any() for x in rule(*zeros[:5]))


@given(st.integers(1, 100), st.integers(1, 99))
def test_the_state_carries_everything(tokens: int, percent: int) -> None:
    *x, state = inputs(tokens + 1)
    cut = max(1, (tokens + 1) * percent // 100)
    for rule in (chunked_gated_delta_rule, recurrent_gated_delta_rule):
        whole, end = rule(*x, state)
        first, between = rule(*(y[:, :cut] for y in x), state)
        rest, last = rule(*(y[:, cut:] for y in x), between) if cut < tokens + 1 else (whole[:, :0], between)
        assert worst((torch.cat((first, rest), dim=1), last), (whole, end)) <= LIMITS["rule_fp64"]


@pytest.mark.parametrize("rule", [chunked_gated_delta_rule, recurrent_gated_delta_rule])
def test_a_written_value_is_read_back(rule) -> None:  # type: ignore[no-untyped-def]
    """beta = 1 and no decay: asking for a key right after writing it gives its value over sqrt(dk)."""
    _, k, v, g, beta, state = inputs(70)
    out, _ = rule(k, k, v, torch.zeros_like(g), torch.ones_like(beta), state)
    length = (l2_normalize(k).square().sum(-1)).repeat_interleave(3, dim=2).unsqueeze(-1)
    assert float((out[:, -1] - (length * v)[:, -1] / math.sqrt(10)).abs().max()) <= LIMITS["rule_fp64_read_back"]


@pytest.mark.parametrize("rule", [chunked_gated_delta_rule, recurrent_gated_delta_rule])
def test_query_heads_serve_consecutive_value_heads(rule) -> None:  # type: ignore[no-untyped-def]
    q, k, v, g, beta, state = inputs(9)
    grouped = rule(q, k, v, g, beta, state)
    for head in range(6):
        one = slice(head, head + 1)
        shared = slice(head // 3, head // 3 + 1)
        alone = rule(q[:, :, shared], k[:, :, shared], v[:, :, one], g[:, :, one], beta[:, :, one], state[:, one])
        assert worst(alone, (grouped[0][:, :, one], grouped[1][:, one])) <= LIMITS["rule_fp64"]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_computed_and_kept_in_fp32(dtype: torch.dtype) -> None:
    *x, _ = inputs(70, dtype)
    for rule in (chunked_gated_delta_rule, recurrent_gated_delta_rule):
        out, state = rule(*x)
        wide, wide_state = rule(*(y.float() for y in x))
        assert state.dtype == torch.float32
        assert torch.equal(out, wide.to(dtype))
        assert torch.equal(state, wide_state)


@pytest.mark.parametrize("kind", ["random", "repeated", "zero"])
@pytest.mark.parametrize("size", [1, 2, 16, 32, 64])
def test_the_triangular_inverse_is_accurate_in_fp32(kind: str, size: int) -> None:
    keys = l2_normalize(torch.randn(5, size, 7, generator=torch.Generator().manual_seed(0)))
    if kind != "random":
        keys = keys[:, :1].expand_as(keys) * (kind == "repeated")
    a = (keys @ keys.mT).tril(-1)
    exact = torch.linalg.inv(torch.eye(size, dtype=torch.float64) + a.double())
    assert worst((invert_unit_lower(a),), (exact,)) <= LIMITS["inverse_fp32"]


def test_gradients_are_those_of_the_formulas() -> None:
    *x, state = inputs(3, key_heads=1, groups=2)
    x = [y.requires_grad_() for y in (*x, state)]
    assert torch.autograd.gradcheck(chunked_gated_delta_rule, x, fast_mode=True)


def test_gradients_of_chunks_equal_those_of_steps() -> None:
    grads = []
    for rule in (chunked_gated_delta_rule, recurrent_gated_delta_rule):
        x = [y.requires_grad_() for y in inputs(130)]
        out, state = rule(*x)
        grads.append(torch.autograd.grad(out.square().sum() + state.sum(), x))
    assert worst(*grads) <= LIMITS["rule_fp64"]
