"""Rounding is never taken for a fault, and a wrong scale always is: over many kinds of weights, without files."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from qconvert.core.role import Kind, Section, TensorRole
from qconvert.core.scheme import FP8, FP8_BLOCK, INT8, Scheme, int4
from qconvert.numerics.rounding import quantize
from qconvert.parity.blocks import block_sums
from qconvert.parity.causes import CauseKind
from qconvert.parity.faults import floor_db, innocent, scale_faults

SCHEMES = [int4(32), int4(128), int4(128, symmetric=False), INT8, FP8, FP8_BLOCK]


def weights_of_shape(shape: str, seed: int) -> Tensor:
    """[256, 256] of one kind that is hard to round."""
    gen = torch.Generator().manual_seed(seed)
    w = torch.randn(256, 256, generator=gen)
    match shape:
        case "heavy":
            w = w / torch.randn(256, 256, generator=gen).abs().clamp(min=1e-3)
        case "outliers":
            w[torch.rand(256, 256, generator=gen) < 0.005] *= 60
        case "sparse":
            w[torch.rand(256, 256, generator=gen) < 0.97] = 0
        case "constant":
            w = w.sign()
        case "dead rows":
            w[::3] = 0
        case "uniform":
            w = torch.rand(256, 256, generator=gen) - 0.5
    return w


@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
@settings(max_examples=25, deadline=None)
@given(
    seed=st.integers(0, 10_000),
    shape=st.sampled_from(["gaussian", "heavy", "outliers", "sparse", "constant", "dead rows", "uniform"]),
    size=st.sampled_from([1e-12, 1e-3, 1.0, 1e6]),
    search=st.booleans(),
)
def test_no_rounding_of_any_weights_is_taken_for_a_fault(
    scheme: Scheme, seed: int, shape: str, size: float, search: bool
) -> None:
    w = weights_of_shape(shape, seed) * size
    v = quantize(w, scheme, search=search).quantized.dequantize()
    sums = block_sums(w, v, scheme.blocking)
    role = TensorRole(section=Section.TEXT, kind=Kind.EXPERT_UP, layer=0, expert=0)
    assert list(scale_faults(role, "x", sums, scheme.blocking, (256, 256))) == []
    assert sums.total.sqnr_db >= floor_db(scheme) or innocent(w, sums.total, scheme)


@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
def test_the_hardest_group_for_an_integer_grid_is_no_factor(scheme: Scheme) -> None:
    """All values but one stand just below, or just above, half a step of the scale that the one needs."""
    for step in (0.49, 0.51):
        w = torch.full((8, 128), step / 7.5)
        w[:, 0] = 1.0
        v = quantize(w, scheme).quantized.dequantize()
        role = TensorRole(section=Section.TEXT, kind=Kind.EXPERT_UP, layer=0, expert=0)
        assert list(scale_faults(role, "x", block_sums(w, v, scheme.blocking), scheme.blocking, (8, 128))) == []


@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
def test_every_doubled_or_halved_scale_is_found_at_its_place(scheme: Scheme) -> None:
    gen = torch.Generator().manual_seed(0)
    w = torch.randn(256, 256, generator=gen)
    rounded = quantize(w, scheme).quantized
    role = TensorRole(section=Section.TEXT, kind=Kind.EXPERT_UP, layer=0, expert=0)
    shape = tuple(rounded.scale.shape)
    for factor in (2.0, 0.5):
        for place in range(0, rounded.scale.numel(), max(1, rounded.scale.numel() // 7)):
            index = torch.unravel_index(torch.tensor(place), shape)
            before = rounded.scale[index].clone()
            rounded.scale[index] = before * factor
            sums = block_sums(w, rounded.dequantize(), scheme.blocking)
            rounded.scale[index] = before
            (cause,) = scale_faults(role, "x", sums, scheme.blocking, (256, 256))
            assert cause.kind is CauseKind.SCALE_FACTOR
            assert ("twice" if factor == 2.0 else "half") in cause.evidence
