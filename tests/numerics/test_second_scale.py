"""Two levels of scales (NVFP4): the textbook and compressed-tensors agree, and no range of numbers is out of reach."""

from __future__ import annotations

import math

import pytest
import torch
from compressed_tensors.quantization import QuantizationArgs
from compressed_tensors.quantization.lifecycle.forward import dequantize as upstream_dequantize
from compressed_tensors.quantization.lifecycle.forward import quantize as upstream_quantize
from hypothesis import example, given
from hypothesis import strategies as st
from torch import Tensor

from qconvert.core.scheme import INT8, NVFP4
from qconvert.numerics.finite import largest_of
from qconvert.numerics.rounding import has_kernel, quantize, second_scale_for
from qconvert.numerics.rounding_compiled import quantize_compiled
from qconvert.numerics.rounding_torch import quantize_with_torch
from tests.numerics import textbook
from tests.numerics.matrices import quick
from tests.numerics.test_kernels import odd_matrices
from tests.tolerances import tolerances

CLOSE = tolerances("numerics")["loss_of_kernels"]
ARGS = QuantizationArgs(
    num_bits=4, type="float", strategy="tensor_group", group_size=16, scale_dtype=torch.float8_e4m3fn
)


def gaussian(rows: int, cols: int, power: int) -> Tensor:
    return (torch.randn(rows, cols, generator=torch.Generator().manual_seed(power + 200)) * 2.0**power).bfloat16()


@pytest.mark.parametrize("search", [False, True], ids=["plain", "search"])
@quick
@given(drawn=st.data())
def test_the_kernel_has_the_bits_of_the_plain_expression(search: bool, drawn: st.DataObject) -> None:
    w = drawn.draw(odd_matrices(16))
    second = second_scale_for(NVFP4, largest_of(w.float()))
    ours = quantize_compiled(w, NVFP4, search=search, second=second)
    plain = quantize_with_torch(w, NVFP4, search=search, second=second)
    for a, b in ((ours.quantized.codes, plain.quantized.codes), (ours.quantized.scale, plain.quantized.scale)):
        assert torch.equal(a.view(torch.uint8), b.view(torch.uint8))
    assert ours.squared_error == pytest.approx(plain.squared_error, rel=CLOSE, abs=0)
    assert ours.signal == pytest.approx(plain.signal, rel=CLOSE, abs=0)
    assert has_kernel(NVFP4)


@pytest.mark.parametrize("power", [-60, -9, 0, 5, 90])
def test_equals_the_textbook(power: int) -> None:
    w = gaussian(5, 32, power)
    w[1, :16], w[2] = 0.0, w[2] * 2.0**-16  # a block of zeros; scales that are subnormal in e4m3
    second = second_scale_for(NVFP4, largest_of(w))
    got = quantize(w, NVFP4, second=second).quantized
    codes, scale, _ = textbook.quantize(w.double() / second, NVFP4)
    assert torch.equal(got.scale.float(), scale) and got.second_scale is not None
    wanted = codes.unflatten(1, (-1, 16)) * scale[..., None] * got.second_scale
    assert torch.equal(got.dequantize(), wanted.flatten(1))


def test_compressed_tensors_chooses_the_same_codes_and_reads_the_same_numbers() -> None:
    w = gaussian(64, 256, -6).float()
    q = quantize(w, NVFP4, second=second_scale_for(NVFP4, largest_of(w))).quantized
    assert q.second_scale is not None
    over = q.second_scale.reciprocal().reshape(1)
    codes = upstream_quantize(x=w, scale=q.scale.float(), zero_point=None, args=ARGS, global_scale=over)
    theirs = upstream_dequantize(x_q=codes, scale=q.scale.float(), zero_point=None, args=ARGS, global_scale=over)
    assert torch.equal(q.dequantize(), theirs.float())


@quick
@example(largest=5e-324)
@given(largest=st.floats(min_value=0.0, max_value=3.3e38))
def test_scales_fill_the_upper_half_of_e4m3(largest: float) -> None:
    second = second_scale_for(NVFP4, largest)
    mantissa, _ = math.frexp(second)
    assert mantissa == 0.5
    if 2.0**-80 < largest < 2.0**100:
        assert 224.0 < largest / 6.0 / second <= 448.0


def test_a_scheme_without_a_second_scale_has_none() -> None:
    assert second_scale_for(INT8, 1e9) == 1.0
    assert quantize(gaussian(4, 32, 0), INT8).quantized.second_scale is None


def test_gaussian_weights_keep_their_signal() -> None:
    w = gaussian(512, 1024, -5)
    rounded = quantize(w, NVFP4, second=second_scale_for(NVFP4, largest_of(w)))
    assert 10 * math.log10(rounded.signal / rounded.squared_error) > tolerances("numerics")["nvfp4_sqnr_db"]
