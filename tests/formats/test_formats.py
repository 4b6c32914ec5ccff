"""Every format: sizes known in advance, an exact inverse, rows in any split, clear refusals, upstream's layout."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from compressed_tensors.compressors import BaseCompressor
from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
from torch import Tensor

from qconvert.core.dtypes import DType
from qconvert.core.errors import FormatError
from qconvert.core.quantized import QuantizedTensor
from qconvert.core.scheme import (
    FP8,
    FP8_BLOCK,
    INT8,
    LLM_INT8,
    MXFP4,
    NVFP4,
    W8A8,
    Activation,
    Block,
    Channel,
    Float,
    Group,
    Int,
    ScaleSpec,
    Scheme,
    bnb4,
    int4,
)
from qconvert.formats.table import FORMATS, IN_PACKAGES, READ_ONLY, format_for, format_named
from qconvert.numerics.rounding import quantize

F16_INT4 = replace(int4(32), scale=ScaleSpec(dtype=DType.F16))


def _in_packages(scheme: Scheme) -> Scheme:
    return replace(scheme, scale=ScaleSpec(dtype=DType.F32))


SCHEMES: dict[str, tuple[Scheme, str]] = {
    "int4-g32": (int4(32), "pack-quantized"),
    "int4-g128": (int4(128), "pack-quantized"),
    "int4-channel": (replace(int4(), blocking=Channel()), "pack-quantized"),
    "int4-asym": (int4(32, symmetric=False), "pack-quantized"),
    "int8": (INT8, "pack-quantized"),
    "int8-asym": (replace(INT8, symmetric=False), "pack-quantized"),
    "int8-fp16-scale": (replace(INT8, scale=ScaleSpec(dtype=DType.F16)), "pack-quantized"),
    "w8a8": (W8A8, "int-quantized"),
    "w8a8-fp32-scale": (replace(W8A8, scale=ScaleSpec(dtype=DType.F32)), "int-quantized"),
    "mxfp4": (MXFP4, "mxfp4-pack-quantized"),
    "fp8": (FP8, "float-quantized"),
    "fp8-fp32-scale": (replace(FP8, scale=ScaleSpec(dtype=DType.F32)), "float-quantized"),
    "fp8-block": (FP8_BLOCK, "fp8-block"),
    "fp8-block-fp32-scale": (replace(FP8_BLOCK, scale=ScaleSpec(dtype=DType.F32)), "fp8-block"),
    "fp8-tiles": (FP8_BLOCK, "float-quantized"),
    "nvfp4": (NVFP4, "nvfp4-pack-quantized"),
    "nf4": (bnb4("nf4"), "bitsandbytes-nf4"),
    "fp4": (bnb4("fp4"), "bitsandbytes-fp4"),
    "llm-int8": (LLM_INT8, "bitsandbytes-int8"),
    "gptq-g32": (F16_INT4, "gptq"),
    "gptq-asym": (replace(F16_INT4, symmetric=False), "gptq"),
    "gptq-int8": (replace(INT8, scale=ScaleSpec(dtype=DType.F16)), "gptq"),
    "awq-g128": (replace(F16_INT4, blocking=Group(size=128)), "awq"),
    "awq-asym": (replace(F16_INT4, symmetric=False), "awq"),
    "onnx-g16": (_in_packages(int4(16)), "matmul-nbits"),
    "onnx-asym": (_in_packages(int4(128, symmetric=False)), "matmul-nbits"),
    "onnx-int8": (_in_packages(INT8), "matmul-nbits"),
}
ROWS, COLS = 384, 256
each_scheme = pytest.mark.parametrize("case", SCHEMES)


def weights(case: str) -> Tensor:
    return (torch.randn(ROWS, COLS, generator=torch.Generator().manual_seed(len(case))) * 0.02).bfloat16()


def rounded(case: str) -> QuantizedTensor:
    return quantize(weights(case), SCHEMES[case][0]).quantized


def equal_bytes(a: Tensor, b: Tensor) -> bool:
    raw = [part.clone(memory_format=torch.contiguous_format).view(torch.uint8) for part in (a, b)]
    return a.dtype == b.dtype and a.shape == b.shape and torch.equal(*raw)


@each_scheme
def test_stores_what_it_announced(case: str) -> None:
    scheme, name = SCHEMES[case]
    parts = format_named(name).pack(rounded(case))
    specs = format_named(name).parts(scheme, (ROWS, COLS))
    assert [spec.suffix for spec in specs] == sorted(parts, key=[spec.suffix for spec in specs].index)
    for spec in specs:
        part = parts[spec.suffix]
        assert (DType.from_torch(part.dtype), tuple(part.shape)) == (spec.dtype, spec.shape), spec.suffix
        assert part.is_contiguous() and (part.ndim == 0 or part.stride(-1) == 1), (
            spec.suffix
        )  # Its bytes can be viewed.
    if format_named(name) not in IN_PACKAGES:
        assert name == format_for(scheme).name or format_for(scheme, format_named(name).quant_method).name == name


@each_scheme
def test_reads_back_exactly(case: str) -> None:
    scheme, name = SCHEMES[case]
    before = rounded(case)
    after = format_named(name).unpack(format_named(name).pack(before), scheme, (ROWS, COLS))
    assert (after.scheme, after.shape) == (before.scheme, before.shape)
    assert equal_bytes(after.codes, before.codes) and equal_bytes(after.scale, before.scale)
    assert (after.zero_point is None) == (before.zero_point is None)
    if before.zero_point is not None and after.zero_point is not None:
        assert equal_bytes(after.zero_point, before.zero_point)


@each_scheme
@pytest.mark.parametrize("multiple", [1, 2])
def test_runs_of_rows_fill_their_place(case: str, multiple: int) -> None:
    scheme, name = SCHEMES[case]
    form = format_named(name)
    w = torch.randn(ROWS, COLS, generator=torch.Generator().manual_seed(3)).bfloat16()
    whole = form.pack(quantize(w, scheme).quantized)
    specs = form.parts(scheme, (ROWS, COLS))
    built = {spec.suffix: torch.empty(spec.shape, dtype=spec.dtype.torch_dtype) for spec in specs}
    step = form.row_block(scheme, (ROWS, COLS)) * multiple
    step *= max(1, 50 // step)
    for begin in range(0, ROWS, step):
        end = min(ROWS, begin + step)
        run = form.pack(quantize(w[begin:end], scheme).quantized, shape=(ROWS, COLS))
        for spec in specs:
            if spec.rows_per_row == 0:
                built[spec.suffix] = run[spec.suffix]
            else:
                first, last = spec.rows_of(begin, end)
                assert run[spec.suffix].shape[0] == last - first
                built[spec.suffix][first:last] = run[spec.suffix]
    assert all(equal_bytes(built[suffix], part) for suffix, part in whole.items())


UPSTREAM = {
    "int4-g32": {"num_bits": 4, "strategy": "group", "group_size": 32},
    "int4-g128": {"num_bits": 4, "strategy": "group", "group_size": 128},
    "int4-channel": {"num_bits": 4, "strategy": "channel"},
    "int4-asym": {"num_bits": 4, "strategy": "group", "group_size": 32, "symmetric": False},
    "int8": {"num_bits": 8, "strategy": "channel"},
    "int8-asym": {"num_bits": 8, "strategy": "channel", "symmetric": False},
    "int8-fp16-scale": {"num_bits": 8, "strategy": "channel"},
    "w8a8": {"num_bits": 8, "strategy": "channel"},
    "w8a8-fp32-scale": {"num_bits": 8, "strategy": "channel"},
    "mxfp4": {
        "num_bits": 4,
        "type": "float",
        "strategy": "group",
        "group_size": 32,
        "scale_dtype": torch.uint8,
        "zp_dtype": torch.uint8,
    },
    "fp8": {"num_bits": 8, "type": "float", "strategy": "channel"},
    "fp8-fp32-scale": {"num_bits": 8, "type": "float", "strategy": "channel"},
}


@pytest.mark.parametrize("case", UPSTREAM)
def test_compressed_tensors_writes_the_same_bytes_and_reads_the_same_numbers(case: str) -> None:
    before = rounded(case)
    name = SCHEMES[case][1]
    ours = format_named(name).pack(before)
    args = QuantizationArgs(**UPSTREAM[case])
    compressor = BaseCompressor.get_value_from_registry(name)
    scheme = QuantizationScheme(targets=["Linear"], weights=args)
    numbers = before.dequantize().to(before.scale.dtype)
    theirs = compressor.decompress(dict(ours), scheme)["weight"]
    assert torch.equal(theirs.to(before.scale.dtype), numbers)
    # Quotients by powers of two are exact, and theirs keeps the sign of what becomes zero, but not of zero.
    written_from = weights(case).float() if case == "mxfp4" else before.dequantize()
    state = {"weight": written_from, "weight_scale": before.scale.float()}
    if before.zero_point is not None:
        half = 2 ** (before.scheme.weight_bits - 1)
        state["weight_zero_point"] = (before.zero_point.to(torch.int16) - half).to(torch.int8)
    written = compressor.compress(state, scheme)
    assert set(written) == set(ours)
    for suffix, part in ours.items():
        if suffix != "weight_scale":  # Theirs is float32 here, so that codes are not moved by a BF16 quotient.
            assert equal_bytes(written[suffix], part), suffix


def test_a_block_scale_multiplies_its_tile() -> None:
    parts = format_named("fp8-block").pack(rounded("fp8-block"))
    assert set(parts) == {"weight", "weight_scale_inv"}
    tall = parts["weight_scale_inv"].float().repeat_interleave(128, 0).repeat_interleave(128, 1)
    assert torch.equal(parts["weight"].float() * tall, rounded("fp8-block").dequantize())


REFUSALS = [
    ("pack-quantized", int4(128), (64, 320), r"groups of 128 do not divide the 320 columns of a 64 x 320 matrix"),
    ("pack-quantized", replace(int4(), blocking=Channel()), (64, 36), "8 codes in a word, which does not divide 36"),
    ("pack-quantized", INT8, (64, 34), "4 codes in a word, which does not divide 34 columns"),
    ("pack-quantized", int4(32, symmetric=False), (60, 64), "8 zero points in a word, which does not divide 60 rows"),
    ("pack-quantized", FP8, (64, 64), "4- and 8-bit integers, not fp8"),
    ("pack-quantized", replace(int4(), grid=Int(bits=3)), (64, 64), "4- and 8-bit integers, not int3"),
    ("pack-quantized", replace(INT8, blocking=Block(rows=128, cols=128)), (128, 128), "per channel or group"),
    ("pack-quantized", replace(INT8, activation=Activation(kind="dynamic", grid=Int(bits=8))), (64, 64), "16-bit"),
    ("pack-quantized", replace(INT8, scale=ScaleSpec(dtype=DType.F8_E8M0)), (64, 64), "BF16, F16 or F32"),
    ("pack-quantized", W8A8, (64, 64), "16-bit activations"),
    ("int-quantized", INT8, (64, 64), "dynamic int8 activations per token"),
    ("int-quantized", replace(W8A8, symmetric=False), (64, 64), "symmetric int8"),
    ("int-quantized", replace(W8A8, grid=Int(bits=4)), (64, 64), "symmetric int8"),
    ("int-quantized", replace(W8A8, scale=ScaleSpec(dtype=DType.F8_E8M0)), (64, 64), "BF16, F16 or F32"),
    ("mxfp4-pack-quantized", MXFP4, (64, 48), "groups of 32 do not divide the 48 columns"),
    ("mxfp4-pack-quantized", replace(MXFP4, scale=ScaleSpec(dtype=DType.BF16)), (64, 64), "F8_E8M0 scales"),
    ("mxfp4-pack-quantized", int4(32), (64, 64), "holds fp4-g32 .* not int4-g32-sym"),
    ("float-quantized", INT8, (64, 64), "one scale per channel"),
    ("float-quantized", replace(FP8_BLOCK, blocking=Block(rows=64, cols=64)), (128, 128), "128 x 128 tiles"),
    ("float-quantized", FP8_BLOCK, (192, 128), "tiles of 128 x 128 do not divide"),
    ("gptq", int4(32), (64, 64), "one F16 scale per block"),
    ("gptq", replace(F16_INT4, grid=Int(bits=3)), (64, 64), "4 or 8 bits, not int3"),
    ("gptq", F16_INT4, (60, 64), "8 codes in a word, which does not divide 60 x 64"),
    ("gptq", F16_INT4, (64, 48), "groups of 32 do not divide the 48 columns"),
    ("gptq", FP8, (64, 64), "4 or 8 bits, not fp8"),
    ("awq", replace(INT8, scale=ScaleSpec(dtype=DType.F16)), (64, 64), "integers of 4 bits, not int8"),
    ("awq", replace(F16_INT4, blocking=Channel()), (64, 64), "per group, not per channel"),
    ("nvfp4-pack-quantized", MXFP4, (64, 64), "a second one, not fp4-g32"),
    ("nvfp4-pack-quantized", NVFP4, (64, 40), "groups of 16 do not divide the 40 columns"),
    ("float-quantized", replace(FP8, activation=Activation()), (64, 64), "dynamic fp8 activations per token"),
    ("fp8-block", FP8, (128, 128), "128 x 128 tiles, not fp8-channel"),
    ("fp8-block", FP8_BLOCK, (192, 128), "tiles of 128 x 128 do not divide a 192 x 128 matrix"),
    ("fp8-block", FP8_BLOCK.weight_only(), (128, 128), "dynamic fp8 activations per 128 inputs"),
    ("fp8-block", replace(FP8_BLOCK, scale=ScaleSpec(dtype=DType.F16)), (128, 128), "BF16 or F32"),
]


@pytest.mark.parametrize(("name", "scheme", "shape", "message"), REFUSALS)
def test_refuses_with_the_reason(name: str, scheme: Scheme, shape: tuple[int, int], message: str) -> None:
    for act in (format_named(name).check, format_named(name).parts):
        with pytest.raises(FormatError, match=message):
            act(scheme, shape)


def test_stored_parts_that_contradict_each_other_are_errors() -> None:
    form, scheme, shape = format_named("pack-quantized"), int4(32), (ROWS, COLS)
    good = form.pack(rounded("int4-g32"))
    broken: list[tuple[dict[str, Tensor], str]] = [
        ({k: v for k, v in good.items() if k != "weight_scale"}, "weight_scale is missing"),
        (
            good | {"weight_scale": good["weight_scale"][:, :3]},
            r"weight_scale is .*\(384, 3\), expected BF16 \(384, 8\)",
        ),
        (good | {"weight_scale": good["weight_scale"].half()}, "weight_scale is torch.float16"),
        (good | {"weight_shape": torch.tensor([COLS, ROWS])}, r"weight_shape says \[256, 384\]"),
        (good | {"weight_scale": good["weight_scale"].clone().index_fill_(0, torch.tensor(5), 0.0)}, "8 scales"),
        (good | {"weight_scale": torch.full_like(good["weight_scale"], torch.nan)}, "3072 scales"),
    ]
    for parts, message in broken:
        with pytest.raises(FormatError, match=message):
            form.unpack(parts, scheme, shape)


def test_names_are_unique_and_unknown_ones_list_the_known() -> None:
    known = (*FORMATS, *READ_ONLY, *IN_PACKAGES)
    assert len({form.name for form in known}) == len(known)
    with pytest.raises(FormatError, match="no format is called 'gguf'; there are pack-quantized"):
        format_named("gguf")
    with pytest.raises(FormatError, match="no format holds fp4-g64: pack-quantized holds"):
        format_for(replace(int4(64), grid=Float(kind="e2m1")))
