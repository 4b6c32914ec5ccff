"""Scales searched under what each input counts for: the least weighted error of all that are tried."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from qconvert.core.errors import DataError
from qconvert.core.scheme import Block
from qconvert.numerics.importance import LEAST_IMPORTANCE, importance_of, quantize_by_importance
from qconvert.numerics.rounding import quantize
from qconvert.numerics.rounding_compiled import quantize_compiled
from qconvert.numerics.rounding_rule import SEARCH_FACTORS
from qconvert.numerics.rounding_torch import quantize_with_torch
from tests.numerics import textbook
from tests.numerics.matrices import SCHEMES, matrices, quick
from tests.numerics.test_kernels import WITH_KERNEL, assert_same_codes, group_of, odd_matrices
from tests.tolerances import tolerances

SLACK = tolerances("numerics")["sum_of_squares"]
each_blocking = pytest.mark.parametrize("name", ("int4-g8", "int4-asym", "int8-tensor", "fp8-block-edges", "mxfp4-g8"))


def counts(inputs: int, seed: int) -> Tensor:
    gen = torch.Generator().manual_seed(seed)
    return torch.randn(inputs, generator=gen).mul_(2).exp_() * (torch.rand(inputs, generator=gen) > 0.2)


@pytest.mark.parametrize("name", [name for name in WITH_KERNEL if name not in ("int4-g1", "int4-fp16-scale", "int8")])
@quick
@given(drawn=st.data(), seed=st.integers(0, 999))
def test_the_kernels_have_the_bits_of_the_plain_expression(name: str, drawn: st.DataObject, seed: int) -> None:
    scheme = WITH_KERNEL[name]
    w = drawn.draw(odd_matrices(group_of(scheme)))
    weights = importance_of(counts(w.shape[1], seed))
    kernel = quantize_compiled(w, scheme, search=True, importance=weights)
    assert_same_codes(kernel, quantize_with_torch(w, scheme, search=True, importance=weights))


@each_blocking
@quick
@given(w=matrices(extreme=False), seed=st.integers(0, 999))
def test_no_scale_that_is_tried_is_better_in_any_block(name: str, w: Tensor, seed: int) -> None:
    scheme, weights = SCHEMES[name], importance_of(counts(w.shape[1], seed)).double()

    def weighted(values: Tensor) -> list[float]:
        error = (values.double() - w.double()).square() * weights
        places = textbook.blocks(scheme, *w.shape).values()
        return [float(error[tuple(zip(*elements, strict=True))].sum()) for elements in places]

    chosen = weighted(quantize_by_importance(w, scheme, counts(w.shape[1], seed)).quantized.dequantize())
    with pytest.MonkeyPatch.context() as patch:
        for factor in (*SEARCH_FACTORS[::5], SEARCH_FACTORS[-1]):
            patch.setattr("qconvert.numerics.rounding_torch.SEARCH_FACTORS", (factor, factor))
            tried = weighted(quantize_with_torch(w, scheme, search=True).quantized.dequantize())
            assert all(a <= b * (1 + SLACK) for a, b in zip(chosen, tried, strict=True))


@each_blocking
@quick
@given(w=matrices(), power=st.integers(-60, 60))
def test_inputs_that_count_the_same_change_nothing(name: str, w: Tensor, power: int) -> None:
    plain = quantize(w, SCHEMES[name], search=True)
    for same in (torch.full((w.shape[1],), 2.0**power), torch.zeros(w.shape[1])):
        assert_same_codes(quantize_by_importance(w, SCHEMES[name], same), plain)


def test_an_input_that_counts_for_more_is_rounded_more_finely() -> None:
    w = torch.randn(64, 128, generator=torch.Generator().manual_seed(0))
    squares = torch.ones(128)
    squares[::16] = 100.0
    scheme = replace(SCHEMES["int4-g8"], blocking=Block(rows=1, cols=128))
    errors = [
        (rounded.quantized.dequantize() - w)[:, ::16].square().sum()
        for rounded in (quantize_by_importance(w, scheme, squares), quantize(w, scheme, search=True))
    ]
    assert errors[0] < 0.9 * errors[1]


def test_importance_is_the_mean_square_over_its_mean() -> None:
    found = importance_of(torch.tensor([0.0, 1.0, 3.0, 4.0]))
    torch.testing.assert_close(found, torch.tensor([LEAST_IMPORTANCE, 0.5, 1.5, 2.0]))
    assert torch.equal(importance_of(torch.zeros(3)), torch.ones(3))


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -1.0])
def test_what_is_no_mean_square_is_an_error(bad: float) -> None:
    with pytest.raises(DataError, match="mean squares of inputs hold"):
        importance_of(torch.tensor([1.0, bad]))
    with pytest.raises(ValueError, match="mean squares for 8 inputs"):
        quantize_by_importance(torch.ones(2, 8), SCHEMES["int8"], torch.ones(7))
