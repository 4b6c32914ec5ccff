"""Scaling inputs changes no output, is found as the paper finds it, and never loses to not scaling."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional

from qconvert.core.errors import DataError
from qconvert.core.scheme import int4
from qconvert.numerics import awq as module
from qconvert.numerics.awq import (
    EXPONENTS,
    awq,
    divided_rows,
    factors_from,
    fold_into_norm,
    powers_of_two,
    repeated_places,
    scaled_columns,
    value_places,
)
from qconvert.numerics.hessian import blended, factorize, no_moments
from qconvert.numerics.rounding import quantize
from tests.numerics.matrices import quick
from tests.numerics.test_hessian import DEGENERATE
from tests.tolerances import tolerances

CLOSE = tolerances("calibrated")["fold"]


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def factors(count: int) -> Tensor:
    return normal(count, seed=9).exp()


def close(a: Tensor, b: Tensor) -> None:
    torch.testing.assert_close(a, b, rtol=0, atol=CLOSE * float(b.abs().max()))


def test_up_to_down() -> None:
    x, gate, up, down, s = normal(5, 6), normal(8, 6, seed=1), normal(8, 6, seed=2), normal(6, 8, seed=3), factors(8)
    before = (functional.silu(x @ gate.T) * (x @ up.T)) @ down.T
    after = (functional.silu(x @ gate.T) * (x @ divided_rows(up, s).T)) @ scaled_columns(down, s).T
    close(after, before)


def test_values_to_output_through_grouped_heads_and_their_gate() -> None:
    heads, value_heads, width, tokens = 6, 2, 4, 5
    weights = normal(heads, tokens, tokens, seed=1).softmax(-1)
    v, o, gate = normal(value_heads * width, 7, seed=2), normal(7, heads * width, seed=3), normal(tokens, 24, seed=4)
    x, s = normal(tokens, 7), factors(value_heads * width)

    def attend(v: Tensor, o: Tensor) -> Tensor:
        values = (x @ v.T).view(tokens, value_heads, width).repeat_interleave(heads // value_heads, dim=1)
        mixed = torch.einsum("hts,shw->thw", weights, values).reshape(tokens, -1)
        return (mixed * gate.sigmoid()) @ o.T

    close(attend(divided_rows(v, s), scaled_columns(o, s[value_places(heads, value_heads, width)])), attend(v, o))
    with pytest.raises(ValueError, match="4 heads of values do not divide 6"):
        value_places(6, 4, width)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_a_norm_to_all_that_reads_it(dtype: torch.dtype) -> None:
    w, x, reader = normal(16).mul_(0.3).to(dtype), normal(5, 16, seed=1), normal(3, 16, seed=2)
    folded = fold_into_norm(w, factors(16), offset=1.0)
    assert folded.weight.dtype == dtype and folded.kept == 0
    normed = x * x.square().mean(-1, keepdim=True).rsqrt()
    after = (normed * (1.0 + folded.weight.float())) @ scaled_columns(reader, folded.factors).T
    close(after, (normed * (1.0 + w.float())) @ reader.T)
    if dtype == torch.bfloat16:
        assert not torch.allclose(folded.factors, factors(16), rtol=1e-5)


def test_a_norm_of_heads_to_one_output() -> None:
    heads, width = 3, 4
    w, x, gate = normal(width).abs().bfloat16(), normal(5, heads, width, seed=1), normal(5, heads, width, seed=2)
    out, places = normal(7, heads * width, seed=3), repeated_places(heads, width)
    folded = fold_into_norm(w, factors(width), offset=0.0)
    normed = x * x.square().mean(-1, keepdim=True).rsqrt()

    def run(w: Tensor, out: Tensor) -> Tensor:
        return (normed * w.float() * functional.silu(gate)).flatten(1) @ out.T

    close(run(folded.weight, scaled_columns(out, folded.factors[places])), run(w, out))


@quick
@given(
    weights=st.lists(st.floats(-3, 3, width=16) | st.sampled_from((-1.0, 0.0, -0.99609375)), min_size=1, max_size=9),
    size=st.floats(1e-4, 1e4),
    offset=st.sampled_from((0.0, 1.0)),
)
def test_a_folded_norm_is_the_original_or_left_alone(weights: list[float], size: float, offset: float) -> None:
    w = torch.tensor(weights).bfloat16()
    folded = fold_into_norm(w, torch.full(w.shape, size), offset=offset)
    whole, now = w.double() + offset, folded.weight.double() + offset
    assert bool(folded.weight.isfinite().all() and folded.factors.isfinite().all() and (folded.factors > 0).all())
    torch.testing.assert_close(now * folded.factors, whole, rtol=1e-6, atol=0)
    left = (folded.weight == w) & (folded.factors == 1.0)
    assert bool((left | ((folded.factors / size).log2().abs() < 1.01)).all())


def test_powers_of_two_divide_sixteen_bits_exactly() -> None:
    w, s = normal(8, 6).bfloat16(), powers_of_two(factors(8))
    assert torch.equal(divided_rows(w, s).bfloat16() * s.bfloat16()[:, None], w)
    assert bool((s / factors(8)).log2().abs().max() <= 0.5)


def test_the_factors_of_the_paper() -> None:
    sizes = factors(12).double()
    assert torch.equal(factors_from(sizes, 0.0), torch.ones(12))
    for exponent in EXPONENTS[1:]:
        powers = sizes**exponent
        expected = powers / (powers.max() * powers.min()) ** 0.5
        torch.testing.assert_close(factors_from(sizes, exponent), expected.float())


def test_the_exponent_with_the_least_error_of_outputs() -> None:
    x = normal(400, 32) * factors(32) ** 2
    consumers = [normal(9, 32, seed=seed) for seed in (1, 2)]
    seen = no_moments(32, dtype=torch.float64).add(x)
    factor = factorize(blended(seen), damping=1e-6)
    found = awq(consumers, int4(16), seen.mean_abs, factor)
    losses = []
    for exponent in EXPONENTS:
        s = factors_from(x.double().abs().mean(0), exponent)
        error = [quantize(w * s, int4(16), search=True).quantized.dequantize() / s - w for w in consumers]
        losses.append(sum(float((x @ e.T).square().sum()) / 400 for e in error))
    assert found.exponent == EXPONENTS[losses.index(min(losses))] > 0
    assert found.loss == pytest.approx(min(losses), rel=1e-3)
    assert found.unscaled_loss == pytest.approx(losses[0], rel=1e-3)
    assert found.loss < 0.9 * found.unscaled_loss


def test_inputs_that_share_a_factor_have_that_of_their_mean() -> None:
    places = value_places(4, 2, 3)
    assert places.tolist() == [0, 1, 2, 0, 1, 2, 3, 4, 5, 3, 4, 5]
    x = normal(50, 12) * factors(12)
    seen = no_moments(12).add(x)
    found = awq([normal(5, 12)], int4(4), seen.mean_abs, factorize(blended(seen)), places=places)
    means = seen.mean_abs.view(2, 2, 3).mean(1).flatten()
    torch.testing.assert_close(found.factors, factors_from(means, found.exponent))
    assert repeated_places(2, 3).tolist() == [0, 1, 2, 0, 1, 2]


@pytest.mark.parametrize("kind", DEGENERATE)
def test_nothing_is_worse_than_not_scaling(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "EXPONENTS", (0.0, 0.5, 0.95))
    seen = no_moments(24).add(DEGENERATE[kind](normal(99, 24)))
    found = awq([normal(5, 24)], int4(8), seen.mean_abs, factorize(blended(seen)))
    assert found.loss <= found.unscaled_loss
    assert bool(found.factors.isfinite().all()) and bool((found.factors > 0).all())


def test_what_does_not_fit_says_so() -> None:
    factor = factorize(blended(no_moments(4)))
    with pytest.raises(DataError, match="mean sizes of inputs"):
        awq([normal(2, 4)], int4(4), torch.tensor([1.0, torch.nan, 1.0, 1.0]), factor)
    with pytest.raises(ValueError, match="3 places for 4 inputs"):
        awq([normal(2, 4)], int4(4), torch.ones(4), factor, places=torch.arange(3))
