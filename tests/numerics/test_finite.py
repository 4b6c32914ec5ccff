"""A single number that is not finite is found, wherever it stands and whatever its type."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from qconvert.numerics.finite import all_finite
from qconvert.numerics.finite_kernels import RUN

TYPES = [torch.bfloat16, torch.float16, torch.float32, torch.float64]


@pytest.mark.parametrize("dtype", TYPES, ids=str)
@settings(deadline=None, max_examples=40)
@given(size=st.integers(1, 100) | st.integers(RUN - 40, 2 * RUN + 40), where=st.data())
def test_one_in_many(dtype: torch.dtype, size: int, where: st.DataObject) -> None:
    info = torch.finfo(dtype)
    ordinary = torch.tensor([0.0, -0.0, info.max, info.min, info.smallest_normal, -info.smallest_normal / 2, 1.0])
    values = ordinary.to(torch.float64).to(dtype)[torch.arange(size) % 7]
    values = values.clamp(info.min, info.max)
    assert all_finite(values)
    at = where.draw(st.integers(0, size - 1))
    values[at] = where.draw(st.sampled_from([float("nan"), -float("nan"), float("inf"), -float("inf")]))
    assert not all_finite(values)
    assert all_finite(values[:at]) and all_finite(values[at + 1 :])


@pytest.mark.parametrize("dtype", TYPES, ids=str)
def test_patterns_of_the_upper_sixteen_bits(dtype: torch.dtype) -> None:
    upper = torch.arange(-(2**15), 2**15, 7)
    match dtype.itemsize:
        case 2:
            values = upper.to(torch.int16).view(dtype)
        case 4:
            values = (upper << 16).to(torch.int32).view(dtype)
        case _:
            values = (upper << 48).view(dtype)
    for value, finite in zip(values[:, None], values.isfinite().tolist(), strict=True):
        assert all_finite(value) == finite


def test_other_layouts_and_types() -> None:
    values = torch.ones(6, 5)
    values[3, 2] = float("nan")
    assert not all_finite(values) and not all_finite(values.T) and not all_finite(values[:, 2])
    assert all_finite(values[:, 1]) and all_finite(torch.empty(0)) and all_finite(torch.tensor(3.0))
    assert all_finite(torch.ones(3, dtype=torch.int64)) and all_finite(torch.ones(3, dtype=torch.bool))
    codes = torch.tensor([0, 0x7E, 0xFE, 0x80], dtype=torch.uint8)
    assert all_finite(codes.view(torch.float8_e4m3fn))
    assert not all_finite(torch.tensor([0, 0x7F], dtype=torch.uint8).view(torch.float8_e4m3fn))
    assert not all_finite(torch.tensor([0, 0x7C], dtype=torch.uint8).view(torch.float8_e5m2))
