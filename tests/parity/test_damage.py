"""Destroyed codes and scales are named at their place; no way to round is taken for damage."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from qconvert.core.quantized import QuantizedTensor
from qconvert.core.role import Kind, Section, TensorRole
from qconvert.core.scheme import (
    FP8,
    FP8_BLOCK,
    INT8,
    Activation,
    Block,
    Blocking,
    Channel,
    Codebook,
    Flat,
    Float,
    Group,
    Int,
    PerTensor,
    Scheme,
    int4,
)
from qconvert.numerics.rounding import quantize
from qconvert.parity.blocks import block_sums, joined
from qconvert.parity.causes import Cause, CauseKind, Severity
from qconvert.parity.damage import _extremes, damage_faults, excess_db, piece_sums
from qconvert.parity.faults import scale_faults
from qconvert.parity.tensors import compare_weights
from qconvert.weights.source import CheckpointWeights
from tests.conftest import Converted
from tests.edits import edit_tensors
from tests.parity.test_faults import SCHEMES, weights_of_shape
from tests.tolerances import tolerances

LIMITS = tolerances("parity")


ROLE = TensorRole(section=Section.TEXT, kind=Kind.EXPERT_UP, layer=0, expert=0)
UP = "model.language_model.layers.2.mlp.experts.3.up_proj."


def faults(w: Tensor, v: Tensor, scheme: Scheme, *, step: int | None = None) -> Iterator[Cause]:
    """What both searches say of ``v``, compared ``step`` rows at a time."""
    step = step or len(w)
    blocks, small, excess = [], [], []
    for begin in range(0, len(w), step):
        a, b = w[begin : begin + step], v[begin : begin + step]
        blocks.append(block_sums(a, b, scheme.blocking))
        small.append(piece_sums(a, b, scheme, blocks[-1]))
        excess.append(excess_db(a, small[-1], scheme))
    shape = tuple(w.shape)
    found = list(scale_faults(ROLE, "x", joined(blocks), scheme.blocking, shape))
    kinds = {one.kind for one in found}
    yield from found
    yield from damage_faults(ROLE, "x", joined(small), torch.cat(excess), scheme, shape, kinds)


@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
@settings(max_examples=25, deadline=None)
@given(
    seed=st.integers(0, 10_000),
    shape=st.sampled_from(["gaussian", "heavy", "outliers", "sparse", "constant", "dead rows", "uniform"]),
    size=st.sampled_from([1e-12, 1e-3, 1.0, 1e6]),
    search=st.booleans(),
    bf16=st.booleans(),
)
def test_no_rounding_is_taken_for_damage(
    scheme: Scheme, seed: int, shape: str, size: float, search: bool, bf16: bool
) -> None:
    w = weights_of_shape(shape, seed) * size
    v = quantize(w, scheme, search=search).quantized.dequantize()
    v = v.bfloat16().float() if bf16 else v
    assert list(faults(w, v, scheme)) == []


@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
def test_columns_that_the_scale_of_a_row_cannot_reach_are_no_damage(scheme: Scheme) -> None:
    w = weights_of_shape("gaussian", 0)
    w[:, 100:] *= 1e-7
    assert list(faults(w, quantize(w, scheme).quantized.dequantize(), scheme)) == []


def feedback(w: Tensor, inputs: Tensor, group: int, clip: float) -> Tensor:
    """Column by column to int4, the error of each carried to those that follow: textbook GPTQ in float64."""
    w = w.to(torch.float64).clone()
    hessian = (inputs.T @ inputs).to(torch.float64)
    hessian += 0.01 * hessian.diag().mean() * torch.eye(len(hessian))
    upper = torch.linalg.cholesky(torch.linalg.inv(hessian), upper=True)
    out = torch.zeros_like(w)
    scale = torch.zeros(len(w), dtype=torch.float64)
    for j in range(w.shape[1]):
        if j % group == 0:
            scale = (w[:, j : j + group].abs().amax(1) * clip / 7.5).bfloat16().double()
        out[:, j] = (w[:, j] / scale).round().clamp(-8, 7) * scale
        w[:, j:] -= ((w[:, j] - out[:, j]) / upper[j, j])[:, None] * upper[j, j:]
    return out.float()


@pytest.mark.parametrize("clip", [1.0, 0.8])
@pytest.mark.parametrize("group", [32, 128])
@pytest.mark.parametrize("inputs", ["independent", "correlated", "low rank", "outliers"])
def test_error_feedback_is_no_damage(inputs: str, group: int, clip: float) -> None:
    gen = torch.Generator().manual_seed(0)
    cols = 384
    w = torch.randn(192, cols, generator=gen) * 0.02
    x = torch.randn(800, cols, generator=gen)
    match inputs:
        case "correlated":
            for j in range(1, cols):
                x[:, j] = 0.95 * x[:, j - 1] + 0.3 * x[:, j]
        case "low rank":
            x = x[:, : cols // 4] @ torch.randn(cols // 4, cols, generator=gen) + 0.3 * x
        case "outliers":
            x = x * torch.exp(1.5 * torch.randn(cols, generator=gen)) + 2 * torch.randn(800, 1, generator=gen)
    assert list(faults(w, feedback(w, x, group, clip), int4(group))) == []


def spoiled(scheme: Scheme) -> tuple[Tensor, QuantizedTensor]:
    w = torch.randn(256, 384, generator=torch.Generator().manual_seed(1))
    return w, quantize(w, scheme).quantized


def place_of(scheme: Scheme) -> str:
    return {
        "int4-g32-sym": "row 7, columns 64 to 95",
        "int4-g128-sym": "row 7, columns 0 to 127",
        "int4-g128-asym": "row 7, columns 0 to 127",
        "int8-channel-sym": "row 7",
    }.get(str(scheme), "row 7, columns 0 to 127")


@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
def test_a_few_wrong_codes_are_found_at_their_place(scheme: Scheme) -> None:
    """Sixteen codes of a row are those of its neighbours, as after a write to a wrong place."""
    w, q = spoiled(scheme)
    q.codes[7, 64:80] = q.codes[8, 64:80].clone()
    (found,) = faults(w, q.dequantize(), scheme)
    assert (found.kind, found.severity) == (CauseKind.DAMAGED, Severity.ERROR)
    assert found.evidence.startswith(f"{place_of(scheme)}: squared error ")
    again = list(faults(w, q.dequantize(), scheme, step=128))
    assert [str(one) for one in again] == [str(found)]


@pytest.mark.parametrize("factor", [1.5, 0.67])
@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
def test_a_scale_that_is_wrong_by_half_is_a_factor(scheme: Scheme, factor: float) -> None:
    w, q = spoiled(scheme)
    if q.zero_point is not None:
        q.zero_point[0, -1], q.codes[0, 256:] = 8, (w[0, 256:] / q.scale[0, -1].float()).round().clamp(-8, 7) + 8
    q.scale[0, -1] *= factor
    (found,) = faults(w, q.dequantize(), scheme)
    assert found.kind is CauseKind.SCALE_FACTOR
    assert "row 0" in found.evidence
    said = float(found.evidence.partition("values are ")[2].split()[0])
    assert said == pytest.approx(factor, rel=LIMITS["scale_factor"])


def test_a_zero_row_that_holds_numbers() -> None:
    w, _ = spoiled(INT8)
    w[7] = 0
    q = quantize(w, INT8).quantized
    q.codes[7, 3] = 1
    (found,) = faults(w, q.dequantize(), INT8)
    assert found.kind is CauseKind.DAMAGED
    assert "row 7: squared error where the original is zero" in found.evidence


@pytest.mark.parametrize("blocking", [PerTensor(), Channel(), Group(size=8), Block(rows=3, cols=5), Flat(size=6)])
def test_extremes_equal_loops(blocking: Blocking) -> None:
    w = torch.randn(7, 12, generator=torch.Generator().manual_seed(0)) - 0.5
    low, high = _extremes(w, blocking)
    for block in torch.cartesian_prod(*(torch.arange(n) for n in low.shape)).view(-1, low.dim()).tolist():
        mine = torch.zeros(low.shape, dtype=torch.float64)
        mine[tuple(block)] = 1
        inside = [
            float(w[i, j])
            for i in range(7)
            for j in range(12)
            if block_sums(torch.eye(7)[i][:, None] * torch.eye(12)[j], w, blocking).signal[tuple(block)]
        ]
        assert float(low[tuple(block)]) == -min(0.0, *inside)
        assert float(high[tuple(block)]) == max(0.0, *inside)


@pytest.mark.parametrize("kind", ["nf4", "e2m1"])
def test_schemes_without_a_rounding_of_ours_are_bounded_too(kind: str) -> None:
    grid = Codebook(kind="nf4") if kind == "nf4" else Float(kind="e2m1")
    levels = {
        "nf4": [-1, -0.7, -0.53, -0.4, -0.28, -0.19, -0.09, 0, 0.08, 0.16, 0.25, 0.34, 0.44, 0.56, 0.72, 1],
        "e2m1": [sign * x / 6 for sign in (-1, 1) for x in (0, 0.5, 1, 1.5, 2, 3, 4, 6)],
    }[kind]  # fmt: skip
    scheme = Scheme(grid=grid, blocking=Flat(size=64), scale=INT8.scale, activation=Activation())
    w = torch.randn(32, 128, generator=torch.Generator().manual_seed(0))
    blocks = w.view(-1, 64)
    largest = blocks.abs().amax(1, keepdim=True)
    table = torch.tensor(levels)
    v = (table[(blocks.unsqueeze(-1) / largest.unsqueeze(-1) - table).abs().argmin(-1)] * largest).view_as(w)
    assert list(faults(w, v, scheme)) == []
    v[4, 64:] = v[5, 64:].clone()
    (found,) = faults(w, v, scheme)
    assert found.kind is CauseKind.DAMAGED
    assert found.evidence.startswith("elements 576 to 639 in row-major order")


def causes_after(original: Path, out: Path) -> tuple[Cause, ...]:
    with CheckpointWeights.open(original) as a, CheckpointWeights.open(out, strict=False) as b:
        return compare_weights(a, b).causes


def test_a_row_of_zero_words_on_disk(converted: Converted) -> None:
    original, out = converted(int4(32))
    edit_tensors(out, lambda t: t[f"{UP}weight_packed"][7].fill_(0))
    (found,) = causes_after(original, out)
    assert (found.kind, found.severity, found.where) == (CauseKind.DAMAGED, Severity.ERROR, "layer 2 expert 3 up")
    assert found.evidence.startswith("12 of 1536 blocks (the first: row 7, columns 0 to 31)")


def test_four_inverted_words_on_disk(converted: Converted) -> None:
    original, out = converted(int4(128))

    def invert(tensors: dict[str, Tensor]) -> None:
        tensors[f"{UP}weight_packed"][5, 16:20] ^= -1

    edit_tensors(out, invert)
    (found,) = causes_after(original, out)
    assert (found.kind, found.severity) == (CauseKind.DAMAGED, Severity.ERROR)
    assert found.evidence.startswith("row 5, columns 128 to 255: squared error")


@pytest.mark.parametrize("scheme", [int4(32), INT8, FP8, FP8_BLOCK], ids=str)
def test_random_codes_in_a_whole_matrix(scheme: Scheme, converted: Converted) -> None:
    original, out = converted(scheme)
    suffix = "weight_packed" if isinstance(scheme.grid, Int) else "weight"
    gen = torch.Generator().manual_seed(0)

    def scramble(tensors: dict[str, Tensor]) -> None:
        codes = tensors[f"{UP}{suffix}"]
        codes.copy_(codes[torch.randperm(len(codes), generator=gen)])

    edit_tensors(out, scramble)
    found = causes_after(original, out)
    assert found[0].severity is Severity.ERROR
    assert found[0].where == "layer 2 expert 3 up"
    assert found[0].kind in (CauseKind.DAMAGED, CauseKind.UNEXPLAINED)
