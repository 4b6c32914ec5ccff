"""Sums by block equal plain loops, for every way to share scales and every remainder."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from qconvert.core.scheme import Block, Blocking, Channel, Flat, Group, PerTensor, ScaleSpec, Scheme, int4
from qconvert.numerics.error import error_sums
from qconvert.parity.blocks import block_sums, describe_block
from tests.tolerances import tolerances

LIMITS = tolerances("parity")


def block_of(row: int, col: int, cols: int, blocking: Blocking | None) -> tuple[int, ...]:
    """Where the scale of one element stands, from the definition."""
    match blocking:
        case PerTensor():
            return (0, 0)
        case Channel() | None:
            return (row, 0)
        case Group(size=size):
            return (row, col // size)
        case Block(rows=tall, cols=wide):
            return (row // tall, col // wide)
        case Flat(size=size):
            return ((row * cols + col) // size,)


@settings(max_examples=60, deadline=None)
@given(
    rows=st.integers(1, 13),
    cols=st.integers(1, 17),
    blocking=st.sampled_from(
        [None, PerTensor(), Channel(), Group(size=4), Group(size=8), Block(rows=3, cols=5), Flat(size=6)]
    ),
    seed=st.integers(0, 100),
)
def test_sums_equal_loops(rows: int, cols: int, blocking: Blocking | None, seed: int) -> None:
    gen = torch.Generator().manual_seed(seed)
    w, v = torch.randn(rows, cols, generator=gen), torch.randn(rows, cols, generator=gen)
    found = block_sums(w, v, blocking)
    sums: dict[tuple[int, ...], list[float]] = {}
    for row in range(rows):
        for col in range(cols):
            a, b = float(w[row, col]), float(v[row, col])
            entry = sums.setdefault(block_of(row, col, cols, blocking), [0.0, 0.0, 0.0, 0.0])
            for i, term in enumerate((a * a, b * b, a * b, (a - b) ** 2)):
                entry[i] += term
    assert len(sums) == found.signal.numel()
    if blocking is not None:
        scheme = Scheme(grid=int4().grid, blocking=blocking, scale=ScaleSpec(dtype=int4().scale.dtype))
        assert tuple(found.signal.shape) == scheme.scale_shape(rows, cols)
    close = LIMITS["block_products"]
    for index, (signal, approximated, product, squared) in sums.items():
        assert float(found.signal[index]) == pytest.approx(signal, rel=LIMITS["block_sums"])
        assert float(found.approximated[index]) == pytest.approx(approximated, rel=LIMITS["block_sums"])
        assert float(found.product[index]) == pytest.approx(product, rel=close, abs=close)
        assert float(found.squared_error[index]) == pytest.approx(squared, rel=LIMITS["block_sums"])
        assert float(found.ratio[index]) == pytest.approx(product / signal, rel=close, abs=close)
    whole = error_sums(w, v)
    assert found.total.sqnr_db == pytest.approx(whole.sqnr_db, abs=LIMITS["block_sqnr_db"])
    assert found.total.cosine == pytest.approx(whole.cosine, abs=LIMITS["block_totals"])
    assert found.total.max_error == pytest.approx(whole.max_error, rel=LIMITS["block_totals"])


def test_vectors_and_convolutions_have_one_block_a_row() -> None:
    gen = torch.Generator().manual_seed(0)
    for shape, blocks in (((7,), 1), ((6, 1, 4), 6)):
        w, v = torch.randn(shape, generator=gen), torch.randn(shape, generator=gen)
        found = block_sums(w, v, None)
        assert found.signal.numel() == blocks
        assert found.total.sqnr_db == pytest.approx(error_sums(w, v).sqnr_db, abs=LIMITS["block_sqnr_db"])


def test_a_nan_reaches_the_maximum() -> None:
    w = torch.ones(4, 8)
    v = w.clone()
    v[2, 3] = torch.nan
    assert math.isnan(block_sums(w, v, Channel()).max_error)


@pytest.mark.parametrize(
    ("index", "blocking", "words"),
    [
        ((5, 0), Channel(), "row 5"),
        ((5, 2), Group(size=32), "row 5, columns 64 to 95"),
        ((1, 0), Block(rows=128, cols=128), "rows 128 to 199, columns 0 to 127"),
        ((0, 0), PerTensor(), "the whole tensor"),
        ((3,), Flat(size=64), "elements 192 to 255 in row-major order"),
    ],
)
def test_blocks_in_words(index: tuple[int, ...], blocking: Blocking, words: str) -> None:
    assert describe_block(index, blocking, (200, 384)) == words


def test_zero_blocks_have_no_ratio() -> None:
    found = block_sums(torch.zeros(2, 8), torch.ones(2, 8), Group(size=4))
    assert found.ratio.isnan().all()
    assert found.cosine.isnan().all()
