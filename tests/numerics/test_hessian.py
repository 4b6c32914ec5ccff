"""Second moments do not depend on how inputs are cut, and whatever they are made of has a finite factor and a name."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from qconvert.core.errors import DataError
from qconvert.numerics import hessian
from qconvert.numerics.hessian import Hessian, Moments, Support, blended, factorize, no_moments
from qconvert.numerics.threads import one_thread
from tests.numerics.matrices import quick
from tests.tolerances import tolerances

LIMITS = tolerances("calibrated")


def moments(x: Tensor, *, dtype: torch.dtype = torch.float32) -> Moments:
    return no_moments(x.shape[1], dtype=dtype).add(x)


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@quick
@given(tokens=st.integers(0, 40), cuts=st.lists(st.integers(0, 40), max_size=5), seed=st.integers(0, 999))
def test_moments_are_those_of_all_tokens_however_they_come(tokens: int, cuts: list[int], seed: int) -> None:
    x = normal(tokens, 12, seed=seed).bfloat16()
    seen = no_moments(12, dtype=torch.float64)
    for part in torch.tensor_split(x, sorted(min(cut, tokens) for cut in cuts)):
        seen = seen.add(part)
        assert seen.kept.shape == (min(seen.tokens, 12), 12)
    wide, count = x.double(), max(tokens, 1)
    assert seen.tokens == tokens
    torch.testing.assert_close(seen.hessian(), wide.T @ wide / count, rtol=0, atol=LIMITS["fp64"])
    torch.testing.assert_close(seen.mean_abs, wide.abs().sum(0) / count, rtol=0, atol=LIMITS["fp64"])
    torch.testing.assert_close(seen.mean_squares, seen.hessian().diagonal(), rtol=0, atol=LIMITS["fp64"])


def test_the_number_of_threads_changes_no_bit_and_is_left_as_it_was() -> None:
    x, before = normal(700, 320), torch.get_num_threads()
    try:
        bits = []
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            factor = factorize(blended(moments(x[:500]), moments(x)))
            bits.append(torch.cat((factor.unit.flatten(), factor.pivots)))
            assert torch.get_num_threads() == threads
        assert torch.equal(bits[0], bits[1]) and torch.equal(bits[0], bits[2])
        with pytest.raises(ZeroDivisionError), one_thread():
            assert torch.get_num_threads() == 1
            _ = 1 / 0
        assert torch.get_num_threads() == 3
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("columns", [1, 5, 12, 13])
def test_how_a_square_is_cut_shows_in_no_sum(columns: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hessian, "_SQUARE_COLUMNS", columns)
    x = normal(40, 12).double()
    seen = moments(x[:30], dtype=torch.float64).add(x[30:])
    for found, rows in ((seen, x), (moments(x[:7], dtype=torch.float64), x[:7])):
        torch.testing.assert_close(found.hessian(), rows.T @ rows / len(rows), rtol=0, atol=LIMITS["fp64"])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_inputs_are_left_as_they_are(dtype: torch.dtype) -> None:
    x = normal(20, 12).to(dtype)
    before = x.clone()
    first = no_moments(12, dtype=torch.float64).add(x)
    kept = first.kept.clone()
    first.add(x)
    factorize(blended(first, first))
    assert torch.equal(x, before) and torch.equal(first.kept, kept)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), 1e19])
def test_inputs_that_cannot_be_summed_are_an_error(bad: float) -> None:
    x = normal(3, 5)
    x[1, 2] = bad
    with pytest.raises(DataError, match="inputs hold NaN, infinity, or numbers"):
        moments(x)


def test_inputs_of_another_width_are_an_error() -> None:
    with pytest.raises(ValueError, match=r"shape \(3, 5\) for a matrix with 6"):
        no_moments(6).add(normal(3, 5))
    with pytest.raises(ValueError, match="6 inputs are pooled with 5"):
        blended(moments(normal(3, 6)), moments(normal(3, 5)))


@quick
@given(tokens=st.integers(0, 30), prior=st.integers(1, 100))
def test_few_tokens_count_little_beside_the_layer(tokens: int, prior: int) -> None:
    own, pooled = moments(normal(tokens, 8, seed=1), dtype=torch.float64), moments(normal(99, 8), dtype=torch.float64)
    both = blended(own, pooled, prior=prior)
    mean = (tokens * own.hessian() + prior * pooled.hessian()) / (tokens + prior)
    torch.testing.assert_close(both.matrix, mean, rtol=0, atol=LIMITS["fp64"])
    expected = Support.POOLED if tokens == 0 else Support.FEW if tokens < 8 else Support.OWN
    assert both.support is expected and both.tokens == tokens
    alone = blended(own)
    assert torch.equal(alone.matrix, own.hessian())
    assert alone.support is (Support.NONE if tokens == 0 else expected)
    assert torch.equal(blended(own, no_moments(8)).matrix, own.hessian())


def test_as_many_tokens_as_inputs_count_half_by_default() -> None:
    own, pooled = moments(normal(8, 8)), moments(normal(99, 8, seed=1))
    torch.testing.assert_close(blended(own, pooled).matrix, (own.hessian() + pooled.hessian()) / 2)


DEGENERATE = {
    "no token": lambda x: x[:0],
    "one token": lambda x: x[:1],
    "one token many times": lambda x: x[:1].expand(99, -1),
    "dead columns": lambda x: x * (torch.arange(x.shape[1]) % 3 > 0),
    "one live column": lambda x: x * (torch.arange(x.shape[1]) == 2),
    "equal columns": lambda x: x[:, :1].expand_as(x),
    "only zeros": torch.zeros_like,
    "tiny": lambda x: x * 1e-18,
    "huge": lambda x: x * 1e15,
    "one column of another size": lambda x: x * torch.where(torch.arange(x.shape[1]) == 1, 1e6, 1.0),
    "ordinary": lambda x: x,
}
NAMES = {"no token": Support.NONE, "one token": Support.FEW, "only zeros": Support.NONE}


@pytest.mark.parametrize("by_size", [False, True])
@pytest.mark.parametrize("name", DEGENERATE)
def test_every_hessian_has_a_finite_factor_and_a_name(name: str, by_size: bool) -> None:
    x = DEGENERATE[name](normal(99, 24))
    whole = blended(moments(x))
    factor = factorize(whole, by_size=by_size)
    assert factor.support is NAMES.get(name, Support.OWN)
    assert factor.dead == int((x == 0).all(0).sum())
    assert sorted(factor.order.tolist()) == list(range(24))
    unit, pivots = factor.unit.double(), factor.pivots.double()
    assert bool(unit.isfinite().all()) and bool(pivots.isfinite().all()) and bool((pivots > 0).all())
    assert torch.equal(unit.triu(), unit) and bool((unit.diagonal() == 1).all())
    if by_size and factor.support is not Support.NONE:
        assert factor.diagonal[factor.order].diff().max() <= 0
    wanted = whole.matrix.double() + factor.damping * torch.eye(24, dtype=torch.float64)
    made = unit * pivots @ unit.T
    wanted = wanted[factor.order][:, factor.order]
    assert float((made - wanted).abs().max()) <= LIMITS["factor"] * float(wanted.abs().max())
    assert bool(factor.importance.isfinite().all())


def test_a_dead_input_is_connected_to_no_other() -> None:
    x = normal(99, 6)
    x[:, 4] = 0.0
    factor = factorize(blended(moments(x)))
    place = factor.order.tolist().index(4)
    others = torch.arange(6) != place
    assert place == 5 and not bool(factor.unit[others, place].any()) and not bool(factor.unit[place, others].any())


@pytest.mark.parametrize("size", [1e-3, 0.5, 1e3])
def test_a_matrix_that_is_no_hessian_is_damped_until_it_is_or_read_as_its_diagonal(size: float) -> None:
    lie = torch.eye(5)
    lie[0, 1] = lie[1, 0] = 1.0 + size
    factor = factorize(Hessian(matrix=lie, tokens=9, support=Support.OWN))
    assert bool(factor.unit.isfinite().all()) and bool((factor.pivots > 0).all())
    assert factor.damping >= 0.01 * (1 - 1e-6)
    if size == 1e3:
        assert torch.equal(factor.unit, torch.eye(5))
    elif size == 0.5:
        assert factor.damping > size


def test_no_factor_of_nan_or_without_damping() -> None:
    with pytest.raises(DataError, match="Hessian holds NaN"):
        factorize(Hessian(matrix=torch.full((2, 2), torch.nan), tokens=1, support=Support.OWN))
    with pytest.raises(ValueError, match="a damping of 0"):
        factorize(blended(moments(normal(9, 2))), damping=0.0)
