"""Activations are rounded as engines round them."""

from __future__ import annotations

from dataclasses import replace
from fractions import Fraction

import pytest
import torch
from compressed_tensors.quantization import QuantizationArgs
from compressed_tensors.quantization.lifecycle.forward import fake_quantize
from compressed_tensors.quantization.utils import compute_dynamic_scales_and_zp, generate_gparam
from hypothesis import given
from torch import Tensor
from transformers.integrations.compressed_tensors import quantize_fp8_per_row

from qconvert.core.errors import FormatError
from qconvert.core.scheme import FP8, FP8_BLOCK, Activation, Float, Int
from qconvert.numerics.activations import quantize_activations
from tests.numerics.matrices import matrices, quick
from tests.numerics.textbook import E2M1, E4M3, nearest, single

INT8_TOKEN = Activation(kind="dynamic", grid=Int(bits=8))
FP8_TOKEN = FP8.activation
FP8_GROUP = Activation(kind="dynamic", grid=Float(kind="e4m3fn"), group=8)
FP8_STATIC = Activation(kind="static", grid=Float(kind="e4m3fn"))
FP4_GROUP = Activation(kind="dynamic", grid=Float(kind="e2m1"), group=8)
SCALES = {FP8_STATIC: 0.0078125 + 2.0**-20, FP4_GROUP: 333.3333435058594}
"""Of those that are stored, both float32; the first lets 4 pass the largest code, the second leaves scales of zero."""
KINDS = [INT8_TOKEN, FP8_TOKEN, FP8_GROUP, FP8_STATIC, FP4_GROUP]


def slow_fp4(run: list[Fraction]) -> list[float]:
    """NVFP4: the group's scale is rounded to e4m3, times a factor for the whole matrix, and its codes to e2m1."""
    over = Fraction(SCALES[FP4_GROUP])
    sixth = single(max(abs(number) for number in run) * single(Fraction(1, 6)))
    scale = Fraction(nearest(E4M3, single(sixth * over)))
    if scale == 0:
        return [0.0] * len(run)
    factor = single(1 / single(scale * single(1 / over)))
    codes = [Fraction(nearest(E2M1, single(number * factor))) for number in run]
    return [float(code * single(scale / over)) for code in codes]


def slow(x: Tensor, activation: Activation) -> Tensor:
    """One number at a time."""
    size = activation.group or x.shape[1]
    out = torch.empty(x.shape)
    for n in range(x.shape[0]):
        for begin in range(0, x.shape[1], size):
            run = [Fraction(number) for number in x[n, begin : begin + size].tolist()]
            if activation == FP4_GROUP:
                out[n, begin : begin + size] = torch.tensor(slow_fp4(run))
                continue
            largest = max(abs(number) for number in run)
            if isinstance(activation.grid, Int):
                scale = single(max(largest, single(Fraction(1e-10))) / 127)
                codes = [Fraction(round(single(number / scale))) for number in run]
            elif activation == FP8_STATIC:
                scale = Fraction(SCALES[FP8_STATIC])
                codes = [Fraction(nearest(E4M3, single(number * single(1 / scale)))) for number in run]
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
    got = quantize_activations(x, activation, SCALES.get(activation))
    assert got.dtype == x.dtype and torch.equal(got, slow(x, activation))


@pytest.mark.parametrize("activation", KINDS, ids=str)
@quick
@given(x=matrices())
def test_stays_finite_and_tokens_do_not_influence_each_other(activation: Activation, x: Tensor) -> None:
    # Twice the largest BF16 number overflows in a product as well; engines never see it.
    x = x.clamp(-1e37, 1e37)
    scale = SCALES.get(activation)
    whole = quantize_activations(x, activation, scale)
    assert bool(whole.isfinite().all())
    assert torch.equal(torch.stack([quantize_activations(row, activation, scale) for row in x]), whole)
    assert torch.equal(quantize_activations(x[None], activation, scale)[0], whole)


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


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_fp4_in_groups_is_that_of_compressed_tensors(dtype: torch.dtype) -> None:
    x = torch.randn(3, 11, 96, generator=torch.Generator().manual_seed(0)).to(dtype)
    x[0, 1, 16:32] = 0
    args = QuantizationArgs(
        num_bits=4, type="float", strategy="tensor_group", group_size=16, dynamic="local", scale_dtype="float8_e4m3fn"
    )
    over = generate_gparam(x.amin().float(), x.amax().float() / 2)  # the largest values are cut off
    scale, zero = compute_dynamic_scales_and_zp(x.float(), args, torch.nn.Module(), global_scale=over)
    theirs = fake_quantize(x.float(), scale, zero, args, global_scale=over)
    ours = quantize_activations(x.float(), replace(FP4_GROUP, group=16), float(over))
    # a sixth of the largest value is a product in vLLM and a quotient there: codes are equal, values an ulp apart
    assert torch.allclose(ours, theirs, rtol=2.0**-22, atol=0)


def test_none_changes_nothing_and_what_is_not_stored_is_missed() -> None:
    x = torch.randn(3, 8)
    assert quantize_activations(x, Activation()) is x
    for activation in SCALES:
        with pytest.raises(FormatError, match="need a stored scale"):
            quantize_activations(x, activation)
    for grid in (Int(bits=8), Float(kind="e2m1")):
        with pytest.raises(FormatError, match=f"static-{grid}-token cannot be simulated"):
            quantize_activations(x, Activation(kind="static", grid=grid), 1.0)
    with pytest.raises(FormatError, match="int4"):
        quantize_activations(x, Activation(kind="dynamic", grid=Int(bits=4)))
