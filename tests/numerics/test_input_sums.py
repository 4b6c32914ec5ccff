"""Sums of inputs are those of all tokens at once, whatever batches they came in, and refuse what is not finite."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from qconvert.core.errors import DataError
from qconvert.numerics.input_sums import InputSums, co_visits


@given(parts=st.lists(st.integers(0, 5), min_size=1, max_size=5), seed=st.integers(0, 5))
def test_batches_add_up(parts: list[int], seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    batches = [torch.randn(count, 7, generator=generator) * 3 for count in parts]
    sums = InputSums.none(7)
    for batch in batches:
        sums = sums.add(batch)
    whole = torch.cat(batches).double()
    assert sums.tokens == len(whole)
    if not len(whole):
        assert not sums.mean_squares.any() and not sums.mean_abs.any() and not sums.largest.any()
        return
    torch.testing.assert_close(sums.mean_squares.double(), whole.square().mean(0), rtol=1e-6, atol=0)
    torch.testing.assert_close(sums.mean_abs.double(), whole.abs().mean(0), rtol=1e-6, atol=0)
    assert torch.equal(sums.largest.double(), whole.abs().amax(0))


@given(split=st.integers(0, 9))
def test_joined_sums_are_those_of_both(split: int) -> None:
    x = torch.randn(9, 5, generator=torch.Generator().manual_seed(1))
    a, b = InputSums.none(5).add(x[:split]), InputSums.none(5).add(x[split:])
    joined, whole = a.joined(b), InputSums.none(5).add(x)
    assert joined.tokens == whole.tokens
    assert torch.equal(joined.largest, whole.largest)
    torch.testing.assert_close(joined.mean_squares, whole.mean_squares, rtol=1e-6, atol=0)


def test_the_last_of_many_tokens_counts_like_the_first() -> None:
    sums = InputSums.none(1)
    for _ in range(40):
        sums = sums.add(torch.full((1 << 20, 1), 1.0))
    assert sums.mean_squares.item() == 1.0
    assert sums.add(torch.full((1, 1), 3.0)).sum_squares.item() == 40 * 2**20 + 9, "float32 would have lost the nine"


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), 1e30])
def test_what_is_not_finite_is_refused(bad: float) -> None:
    with pytest.raises(DataError, match="inputs hold NaN, infinity"):
        InputSums.none(2).add(torch.tensor([[1.0, bad]]))


def test_other_inputs_are_refused() -> None:
    with pytest.raises(ValueError, match=r"\(3, 4\) for a matrix with 5 columns"):
        InputSums.none(5).add(torch.ones(3, 4))


@given(seed=st.integers(0, 20), tokens=st.integers(0, 30))
def test_co_visits_are_counted_pair_by_pair(seed: int, tokens: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    rows = [torch.randperm(6, generator=generator)[:3].tolist() for _ in range(tokens)]
    expected = torch.zeros(6, 6, dtype=torch.int64)
    for row in rows:
        for a in row:
            for b in row:
                expected[a, b] += 1
    assert torch.equal(co_visits(torch.tensor(rows, dtype=torch.int64).reshape(-1, 3), 6), expected)
