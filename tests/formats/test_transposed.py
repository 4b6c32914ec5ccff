"""GPTQ and AWQ bits where their specifications put them, one number at a time; activation order; what is refused."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from qconvert.core.dtypes import DType
from qconvert.core.errors import FormatError, SourceError
from qconvert.core.quantized import QuantizedTensor
from qconvert.core.scheme import INT8, Channel, ScaleSpec, Scheme, int4
from qconvert.formats.awq import Awq
from qconvert.formats.declared import read_declared
from qconvert.formats.gptq import GPTQ_V2, Gptq
from qconvert.numerics.rounding import quantize

F16 = ScaleSpec(dtype=DType.F16)
INT4 = replace(int4(32), scale=F16)
ROWS, COLS = 40, 96
SCHEMES: dict[str, Scheme] = {
    "int4": INT4,
    "int4-channel": replace(INT4, blocking=Channel()),
    "int4-asym": replace(INT4, symmetric=False),
    "int8": replace(INT8, scale=F16),
}
AWQ_NIBBLE = (0, 4, 1, 5, 2, 6, 3, 7)
"""Where AWQ puts output 0, 1, ... of eight in a word."""


def rounded(scheme: Scheme) -> QuantizedTensor:
    w = torch.randn(ROWS, COLS, generator=torch.Generator().manual_seed(4)) * 0.02
    return quantize(w, scheme).quantized


def field(words: Tensor, row: int, col: int, at: int, bits: int) -> int:
    return (int(words[row, col]) & 0xFFFFFFFF) >> (at * bits) & ((1 << bits) - 1)


def value(code: int, zero: int, scale: Tensor) -> float:
    return float((code - zero) * scale.float())


@pytest.mark.parametrize("form", [Gptq(), GPTQ_V2], ids=["v1", "v2"])
@pytest.mark.parametrize("case", SCHEMES)
def test_gptq_bits_mean_the_matrix(case: str, form: Gptq) -> None:
    scheme = SCHEMES[case]
    before = rounded(scheme)
    parts = form.pack(before)
    bits, meant = scheme.weight_bits, before.dequantize()
    per_word, group = 32 // bits, COLS // before.scale.shape[1]
    for n in range(0, ROWS, 7):
        for k in range(0, COLS, 5):
            g = int(parts["g_idx"][k])
            assert g == k // group
            code = field(parts["qweight"], k // per_word, n, k % per_word, bits)
            zero = field(parts["qzeros"], g, n // per_word, n % per_word, bits) + form.zero_offset
            assert value(code, zero, parts["scales"][g, n]) == meant[n, k]


@pytest.mark.parametrize("case", ["int4", "int4-asym"])
def test_awq_bits_mean_the_matrix(case: str) -> None:
    before = rounded(SCHEMES[case])
    parts = Awq().pack(before)
    meant, group = before.dequantize(), COLS // before.scale.shape[1]
    for n in range(0, ROWS, 3):
        for k in range(0, COLS, 5):
            code = field(parts["qweight"], k, n // 8, AWQ_NIBBLE[n % 8], 4)
            zero = field(parts["qzeros"], k // group, n // 8, AWQ_NIBBLE[n % 8], 4)
            assert value(code, zero, parts["scales"][k // group, n]) == meant[n, k]


def test_activation_order_is_read_and_written_back() -> None:
    parts = Gptq().pack(rounded(INT4))
    order = torch.randperm(COLS, generator=torch.Generator().manual_seed(5))
    shuffled = parts | {"g_idx": parts["g_idx"][order]}
    read = Gptq().unpack(shuffled, INT4, (ROWS, COLS))
    assert read.column_group is not None
    codes, groups = read.codes.float(), shuffled["g_idx"]
    for k in range(COLS):
        assert torch.equal(read.dequantize()[:, k], codes[:, k] * read.scale[:, int(groups[k])].float())
    again = Gptq().pack(read)
    assert all(torch.equal(again[name], part) for name, part in shuffled.items())


def test_a_group_index_that_is_no_permutation_is_refused() -> None:
    parts = Gptq().pack(rounded(INT4))
    for at, group in ((0, 1), (5, 3), (7, -1)):
        broken = parts["g_idx"].clone()
        broken[at] = group
        with pytest.raises(FormatError, match="g_idx does not give every group its 32 inputs"):
            Gptq().unpack(parts | {"g_idx": broken}, INT4, (ROWS, COLS))


def test_zero_points_that_engines_do_not_agree_on_are_refused() -> None:
    asymmetric = SCHEMES["int4-asym"]
    parts = Gptq().pack(rounded(asymmetric))
    with pytest.raises(FormatError, match="qzeros holds 15 for a zero point less one"):
        Gptq().unpack(parts | {"qzeros": torch.full_like(parts["qzeros"], -1)}, asymmetric, (ROWS, COLS))
    positive = quantize(torch.rand(ROWS, COLS) + 1.0, asymmetric).quantized
    with pytest.raises(FormatError, match="no room for 0"):
        Gptq().pack(positive)
    assert torch.equal(
        GPTQ_V2.unpack(GPTQ_V2.pack(positive), asymmetric, (ROWS, COLS)).dequantize(), positive.dequantize()
    )
    with pytest.raises(
        FormatError, match="qzeros holds zero points other than 8, but the configuration says symmetric"
    ):
        Gptq().unpack(parts, INT4, (ROWS, COLS))


BLOCK = {"quant_method": "gptq", "bits": 4, "group_size": 32, "sym": True, "desc_act": False}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"bits": 3}, "3 bits; 4 and 8 can be read"),
        ({"bits": True}, "True bits"),
        ({"bits": None}, "None bits"),
        ({"group_size": 0}, "group_size is 0"),
        ({"group_size": "32"}, "group_size is '32'"),
        ({"sym": "yes"}, "sym is 'yes'"),
        ({"checkpoint_format": "marlin"}, "checkpoint_format is 'marlin'; gptq and gptq_v2"),
        ({"checkpoint_format": ["gptq"]}, "checkpoint_format is"),
        ({"dynamic": ["-:.*"]}, "dynamic is"),
        ({"dynamic": {"-:(": {}}}, r"dynamic\['-:\('\] is a broken pattern"),
        ({"dynamic": {"+:a": 4}}, r"dynamic\['\+:a'\] is 4"),
        ({"dynamic": {"+:a": {"bits": 5}}}, "5 bits"),
        ({"quant_method": "awq", "version": "gemv"}, "version is 'gemv'; gemm"),
        ({"quant_method": "awq", "bits": 2}, "2 bits"),
        ({"quant_method": "awq", "modules_to_not_convert": "visual"}, "expected a list of names"),
        ({"quant_method": ["gptq"]}, "quant_method is"),
    ],
)
def test_configurations_that_lie_are_one_error(changes: dict[str, object], message: str) -> None:
    with pytest.raises(SourceError, match=message):
        read_declared({"quantization_config": BLOCK | changes})


def test_dynamic_excludes_and_overrides_and_the_first_match_decides() -> None:
    dynamic = {"-:.*mlp\\.gate$": {}, "+:.*mlp.*": {"bits": 8, "group_size": -1}, ".*": {"group_size": 64}}
    declared = read_declared({"quantization_config": BLOCK | {"dynamic": dynamic, "checkpoint_format": "gptq_v2"}})
    assert declared.of("model.layers.0.mlp.gate") is None
    wide, rest = declared.of("model.layers.0.mlp.experts.0.up_proj"), declared.of("model.layers.0.self_attn.q_proj")
    assert wide is not None and rest is not None
    assert (str(wide.scheme), str(rest.scheme)) == ("int8-channel-sym", "int4-g64-sym")
    assert wide.format == rest.format == GPTQ_V2


def test_awq_keeps_what_has_an_entry_in_its_name() -> None:
    block = {"quant_method": "awq", "w_bit": 4, "q_group_size": 64, "modules_to_not_convert": ["visual", "mlp.gate"]}
    declared = read_declared({"quantization_config": block})
    assert declared.of("model.visual.blocks.0.attn.qkv") is None
    assert declared.of("model.layers.0.mlp.gate") is None
    found = declared.of("model.layers.0.mlp.experts.3.down_proj")
    assert found is not None and str(found.scheme) == "int4-g64-asym"
