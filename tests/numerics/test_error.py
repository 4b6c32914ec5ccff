"""Error sums add up, whatever the blocks, and name the usual ratios."""

from __future__ import annotations

import math
from functools import reduce
from operator import add

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from qconvert.numerics.error import ErrorSums, error_sums, sqnr_db

EXACT = 1e-12


@given(seed=st.integers(0, 1000), step=st.integers(1, 40))
def test_blocks_add_up_to_the_whole(seed: int, step: int) -> None:
    gen = torch.Generator().manual_seed(seed)
    a, b = torch.randn(37, 11, generator=gen), torch.randn(37, 11, generator=gen)
    whole = error_sums(a, b)
    parts = [error_sums(a[i : i + step], b[i : i + step]) for i in range(0, 37, step)]
    total = reduce(add, parts, ErrorSums())
    assert total.elements == 37 * 11 and total.max_error == whole.max_error
    for field in ("signal", "approximated", "product", "squared_error", "sqnr_db", "cosine"):
        assert getattr(total, field) == pytest.approx(getattr(whole, field), rel=EXACT)


def test_ratios_are_those_of_torch() -> None:
    gen = torch.Generator().manual_seed(0)
    a = torch.randn(50, 20, generator=gen)
    b = a + 0.1 * torch.randn(50, 20, generator=gen)
    sums = error_sums(a, b)
    x, y = a.double(), b.double()
    assert sums.cosine == pytest.approx(torch.cosine_similarity(x.flatten(), y.flatten(), dim=0).item(), rel=EXACT)
    assert sums.sqnr_db == pytest.approx(20 * math.log10((x.norm() / (x - y).norm()).item()), rel=EXACT)
    assert sums.max_error == (x - y).abs().max().item()


def test_ends_of_the_scale() -> None:
    one, zero = torch.ones(2, 2), torch.zeros(2, 2)
    assert error_sums(one, one).sqnr_db == math.inf
    assert error_sums(zero, zero).cosine == 1 and error_sums(zero, zero).sqnr_db == math.inf
    assert error_sums(zero, one).sqnr_db == -math.inf
    assert error_sums(one, zero).cosine == 0 and error_sums(one, -one).cosine == -1
    assert sqnr_db(1.0, 0.1) == pytest.approx(10.0)


def test_a_single_nan_is_never_lost() -> None:
    bad = torch.ones(3, 3)
    bad[1, 1] = math.nan
    sums = error_sums(torch.ones(3, 3), torch.ones(3, 3)) + error_sums(torch.ones(3, 3), bad)
    for order in (sums, ErrorSums() + sums, sums + ErrorSums()):
        assert math.isnan(order.max_error) and math.isnan(order.sqnr_db) and math.isnan(order.cosine)


def test_shapes_must_agree() -> None:
    with pytest.raises(ValueError, match=r"\(2, 3\) and \(3, 2\)"):
        error_sums(torch.zeros(2, 3), torch.zeros(3, 2))
