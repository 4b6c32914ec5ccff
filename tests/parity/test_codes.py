"""Codes are counted as a plain look at each of them does, whatever the grid."""

from __future__ import annotations

import math

import pytest
import torch

from qconvert.core.quantized import QuantizedTensor
from qconvert.core.scheme import FP8, INT8, NVFP4, Scheme, bnb4, int4
from qconvert.parity.codes import CodeCounts, code_metrics, count_codes
from qconvert.parity.tensors import Outcome, compare_weights
from qconvert.weights.source import CheckpointWeights
from tests.conftest import Converted
from tests.edits import edit_tensors

ENDS = {
    "int4-g32-sym": [-8.0, -7.0, 7.0],
    "int4-g32-asym": [0.0, 15.0],
    "int8-channel-sym": [-128.0, -127.0, 127.0],
    "fp8-channel-a-dynamic-fp8-token": [-448.0, 448.0],
}


@pytest.mark.parametrize("scheme", [int4(32), INT8, FP8, int4(32, symmetric=False)], ids=str)
def test_shares_and_bits_are_those_of_the_files(scheme: Scheme, conversions: Converted) -> None:
    original, out = conversions(scheme)
    with CheckpointWeights.open(original) as a, CheckpointWeights.open(out) as b:
        tensors = compare_weights(a, b).tensors
        found = {(one.name, one.where): one.value for one in code_metrics(tensors)}
        for path in ("text.expert.gate", "text.expert.down"):
            members = [role for role in b.stored if role.path == path]
            values = torch.cat([b.quantized(role).dequantize().flatten() for role in members])
            assert found["zero_codes", path] == float((values == 0).double().mean())
            codes = torch.cat([b.quantized(role).codes.to(torch.float32).flatten() for role in members])
            ends = torch.isin(codes, torch.tensor(ENDS[str(scheme)]))
            assert found["clipped_codes", path] == float(ends.double().mean())
            assert 0 < found["clipped_codes", path] < 0.2
            assert found["dead_scales", path] == 0
        sizes = sum(info.nbytes for info in b.checkpoint.tensors.values())
        assert found["bits_per_weight", "all tensors"] == pytest.approx(
            8 * sizes / sum(math.prod(stored.shape) for stored in a.stored.values())
        )
        assert found["bits_per_weight", "text.expert.gate"] < 9


@pytest.mark.parametrize(("scheme", "ends"), [(bnb4("nf4"), 2), (bnb4("fp4"), 2), (NVFP4, 2)], ids=str)
def test_the_ends_of_a_codebook_are_its_largest_values(scheme: Scheme, ends: int) -> None:
    codes = torch.arange(16, dtype=torch.uint8).repeat(1, 4)
    q = QuantizedTensor(codes=codes, scale=torch.ones(scheme.scale_shape(1, 64)), scheme=scheme, shape=(1, 64))
    values = q.dequantize()
    found = count_codes(q, values)
    assert found.clipped == 4 * ends == int((values.abs() == values.abs().max()).sum())
    assert found.zeros == int((values == 0).sum()) > 0


def test_dead_scales_are_counted_where_they_are(converted: Converted) -> None:
    original, out = converted(int4(32))
    name = "model.language_model.layers.1.mlp.experts.0.up_proj.weight_scale"

    def break_three(tensors: dict[str, torch.Tensor]) -> None:
        tensors[name][0, :2] = 0.0
        tensors[name][3, 1] = math.nan

    edit_tensors(out, break_three)
    with CheckpointWeights.open(original) as a, CheckpointWeights.open(out, strict=False) as b:
        tensors = compare_weights(a, b).tensors
    broken = next(one for one in tensors if one.outcome is Outcome.UNREADABLE)
    assert broken.codes == CodeCounts(elements=broken.elements, dead_scales=3)
    found = {(one.name, one.where): one.value for one in code_metrics(tensors)}
    assert found["dead_scales", "text.expert.up"] == 3
    assert found["dead_scales", "text.expert.gate"] == 0
