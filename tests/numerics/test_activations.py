"""Activations are rounded as engines round them."""

from __future__ import annotations

from fractions import Fraction

import pytest
import torch
from hypothesis import given
from torch import Tensor
from transformers.integrations.compressed_tensors import quantize_fp8_per_row

from qconvert.core.errors import FormatError
from qconvert.core.scheme import FP8, FP8_BLOCK, Activation, Float, Int
from qconvert.numerics.activations import quantize_activations
from tests.numerics.matrices import matrices, quick
from tests.numerics.textbook import E4M3, nearest, single

INT8_TOKEN = Activation(kind="dynamic", grid=Int(bits=8))
FP8_TOKEN = FP8.activation
FP8_GROUP = Activation(kind="dynamic", grid=Float(kind="e4m3fn"), group=8)
KINDS = [INT8_TOKEN, FP8_TOKEN, FP8_GROUP]


def slow(x: Tensor, activation: Activation) -> Tensor:
    """One number at a time."""
    size = activation.group or x.shape[1]
    out = torch.empty(x.shape)
    for n in range(x.shape[0]):
        for begin in range(0, x.shape[1], size):
            run = [Fraction(number) for number in x[n, begin : begin + size].tolist()]
            largest = max(abs(number) for number in run)
            if isinstance(activation.grid, Int):
                scale = single(max(largest, single(Fraction(1e-10))) / 127)
                codes = [Fraction(round(single(number / scale))) for number in run]
            else:
                floor = Fraction(1, 448 * 512) if activation.group is None else Fraction(0)
                largest = max(largest, single(Fraction(1e-10))) if activation.group else largest
                scale = max(single(largest / 448), single(floor))
                codes = [Fraction(nearest(E4M3, single(number / scale))) for number in run]
            out[n, begin : begin + size] = torch.tensor([float(code * scale) for code in codes])
    return out.to(x.dtype)


@pytest.mark.parametrize("activation", KINDS, ids=str)
@quick
@given(x=matrices(extreme=False))
def test_equals_the_slow_version(activation: Activation, x: Tensor) -> None:
    got = quantize_activations(x, activation)
    assert got.dtype == x.dtype and torch.equal(got, slow(x, activation))


@pytest.mark.parametrize("activation", KINDS, ids=str)
@quick
@given(x=matrices())
def test_stays_finite_and_tokens_do_not_influence_each_other(activation: Activation, x: Tensor) -> None:
    # Twice the largest BF16 number overflows in a product as well; engines never see it.
    x = x.clamp(-1e37, 1e37)
    whole = quantize_activations(x, activation)
    assert bool(whole.isfinite().all())
    assert torch.equal(torch.stack([quantize_activations(row, activation) for row in x]), whole)
    assert torch.equal(quantize_activations(x[None], activation)[0], whole)


def test_fp8_per_token_is_that_of_transformers() -> None:
    x = torch.randn(33, 96, generator=torch.Generator().manual_seed(0))
    codes, scales = quantize_fp8_per_row(x)
    assert torch.equal(quantize_activations(x, FP8_TOKEN), codes.float() * scales[:, None])


def test_a_group_is_128_inputs_in_the_block_scheme() -> None:
    x = torch.randn(5, 256, generator=torch.Generator().manual_seed(1))
    x[:, :128] *= 1000
    rounded = quantize_activations(x, FP8_BLOCK.activation)
    assert torch.equal(rounded[:, 128:], quantize_activations(x[:, 128:], FP8_BLOCK.activation))
    with pytest.raises(ValueError, match="groups of 128 do not divide 192 inputs"):
        quantize_activations(x[:, :192], FP8_BLOCK.activation)


def test_none_changes_nothing_and_static_is_refused() -> None:
    x = torch.randn(3, 8)
    assert quantize_activations(x, Activation()) is x
    with pytest.raises(FormatError, match="stored scale"):
        quantize_activations(x, Activation(kind="static", grid=Int(bits=8)))
    with pytest.raises(FormatError, match="int4"):
        quantize_activations(x, Activation(kind="dynamic", grid=Int(bits=4)))
