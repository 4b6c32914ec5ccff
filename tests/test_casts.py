"""What is stored in another element type, and what is stored as it is."""

from __future__ import annotations

import pytest
import torch

from qconvert.core.dtypes import DType
from qconvert.core.errors import DataError
from qconvert.core.plan import Formula
from qconvert.encode import WEIGHT, cast

TYPES = (DType.BF16, DType.F16, DType.F32)


def _numbers(dtype: torch.dtype) -> torch.Tensor:
    """[5, 7]: both zeros, the smallest and the largest numbers of the type among them."""
    info = torch.finfo(dtype)
    edges = torch.tensor([0.0, -0.0, info.tiny, -info.tiny / 4, 3e4, -1.0 / 3], dtype=torch.float32)
    return torch.cat((edges, torch.randn(29, generator=torch.Generator().manual_seed(1)))).view(5, 7).to(dtype)


@pytest.mark.parametrize("before", TYPES, ids=str)
@pytest.mark.parametrize("after", TYPES, ids=str)
def test_numbers_error_and_signal_are_those_of_float64(before: DType, after: DType) -> None:
    rows = _numbers(before.torch_dtype)
    made = cast(rows, after)
    expected = rows.to(torch.float32).to(after.torch_dtype)
    assert made.parts[WEIGHT].dtype is after.torch_dtype
    assert torch.equal(made.parts[WEIGHT].view(torch.uint8), expected.view(torch.uint8))
    exact = rows.double()
    assert made.squared_error == pytest.approx(float((expected.double() - exact).square().sum()), rel=1e-5)
    assert made.signal == pytest.approx(float(exact.square().sum()), rel=1e-5)


@pytest.mark.parametrize("after", TYPES, ids=str)
def test_formulas_are_computed_in_float32(after: DType) -> None:
    rows = _numbers(torch.bfloat16).clamp(-3, 3)
    wide = rows.to(torch.float32)
    assert torch.equal(cast(rows, after, Formula.ONE_PLUS).parts[WEIGHT], (wide + 1.0).to(after.torch_dtype))
    assert torch.equal(cast(rows, after, Formula.MINUS_EXP).parts[WEIGHT], (-wide.exp()).to(after.torch_dtype))


@pytest.mark.parametrize("before", TYPES, ids=str)
@pytest.mark.parametrize("after", TYPES, ids=str)
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_no_type_hides_what_is_not_finite(before: DType, after: DType, bad: float) -> None:
    rows = _numbers(before.torch_dtype)
    rows[3, 2] = bad
    with pytest.raises(DataError, match="NaN or infinite"):
        cast(rows, after)
