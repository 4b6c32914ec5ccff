"""Destroyed codes and scales are named at their place; no way to round is taken for damage."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from qconvert.core.quantized import E2M1_VALUES, NF4_VALUES, QuantizedTensor
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
from qconvert.numerics.importance import quantize_by_importance
from qconvert.numerics.rounding import quantize
from qconvert.parity.blocks import block_sums, joined
from qconvert.parity.causes import Cause, CauseKind, Severity
from qconvert.parity.damage import _extremes, damage_faults, evidence, together
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


def faults(w: Tensor, q: QuantizedTensor, *, step: int | None = None, bf16: bool = False) -> Iterator[Cause]:
    """What both searches say of ``q``, compared ``step`` rows at a time."""
    v = q.dequantize().bfloat16().float() if bf16 else q.dequantize()
    step = step or len(w)
    blocks, seen = [], []
    for begin in range(0, len(w), step):
        rows = slice(begin, begin + step)
        blocks.append(block_sums(w[rows], v[rows], q.scheme.blocking))
        seen.append(evidence(w[rows], v[rows], rows_of(q, rows), q.scheme, blocks[-1]))
    whole, shape = together(seen), tuple(w.shape)
    found = list(scale_faults(ROLE, "x", joined(blocks), q.scheme.blocking, shape, whole.cut))
    yield from found
    yield from damage_faults(ROLE, "x", whole, q.scheme, shape, {one.kind for one in found})


def rows_of(q: QuantizedTensor, rows: slice) -> QuantizedTensor:
    if q.codes[rows].shape == q.codes.shape:
        return q
    tall = q.scheme.blocking.rows if isinstance(q.scheme.blocking, Block) else 1
    blocks = slice(rows.start // tall, rows.stop // tall)
    zero = None if q.zero_point is None else q.zero_point[blocks]
    codes = q.codes[rows]
    return replace(q, codes=codes, scale=q.scale[blocks], zero_point=zero, shape=(len(codes), codes.shape[1]))


@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
@settings(max_examples=100, deadline=None)
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
    assert list(faults(w, quantize(w, scheme, search=search).quantized, bf16=bf16)) == []


@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
def test_columns_that_the_scale_of_a_row_cannot_reach_are_no_damage(scheme: Scheme) -> None:
    w = weights_of_shape("gaussian", 0)
    w[:, 100:] *= 1e-7
    assert list(faults(w, quantize(w, scheme).quantized)) == []


def feedback(w: Tensor, inputs: Tensor, group: int, clip: float) -> QuantizedTensor:
    """Column by column to int4, the error of each carried to those that follow: textbook GPTQ in float64."""
    shape = (len(w), w.shape[1])
    w = w.to(torch.float64).clone()
    hessian = (inputs.T @ inputs).to(torch.float64)
    hessian += 0.01 * hessian.diag().mean() * torch.eye(len(hessian))
    upper = torch.linalg.cholesky(torch.linalg.inv(hessian), upper=True)
    codes = torch.zeros(shape, dtype=torch.int8)
    scales = torch.zeros(len(w), w.shape[1] // group, dtype=torch.bfloat16)
    scale = torch.zeros(len(w), dtype=torch.float64)
    for j in range(w.shape[1]):
        if j % group == 0:
            scales[:, j // group] = (w[:, j : j + group].abs().amax(1) * clip / 7.5).bfloat16()
            scale = scales[:, j // group].double()
        codes[:, j] = (w[:, j] / scale).round().clamp(-8, 7).to(torch.int8)
        w[:, j:] -= ((w[:, j] - codes[:, j] * scale) / upper[j, j])[:, None] * upper[j, j:]
    return QuantizedTensor(codes=codes, scale=scales, scheme=int4(group), shape=shape)


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
    assert list(faults(w, feedback(w, x, group, clip))) == []


def by_inputs(scheme: Scheme, seed: int, spread: float, uneven: float, scaled: bool) -> tuple[Tensor, QuantizedTensor]:
    """Weights, perhaps of uneven columns, rounded for inputs of uneven sizes, perhaps scaled as AWQ does."""
    gen = torch.Generator().manual_seed(seed)
    w = torch.randn(256, 384, generator=gen) * torch.exp(uneven * torch.randn(384, generator=gen))
    mean_squares = torch.exp(spread * torch.randn(384, generator=gen))
    if scaled:
        factors = mean_squares.pow(0.2)
        w, mean_squares = w * factors, mean_squares / factors.square()
    return w, quantize_by_importance(w, scheme, mean_squares).quantized


@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
@settings(max_examples=100, deadline=None)
@given(
    seed=st.integers(0, 10_000),
    spread=st.sampled_from([0.5, 1.0, 2.0, 4.0]),
    uneven=st.sampled_from([0.0, 0.7, 1.5]),
    scaled=st.booleans(),
)
def test_what_scales_give_up_for_large_inputs_is_no_damage(
    scheme: Scheme, seed: int, spread: float, uneven: float, scaled: bool
) -> None:
    assert list(faults(*by_inputs(scheme, seed, spread, uneven, scaled))) == []


@pytest.mark.parametrize("size", [1.0, 30.0])
def test_a_cut_off_value_that_outweighs_its_row_is_no_wrong_scale(size: float) -> None:
    """Eight bits leave 0.57 of it, and the rest of the row to a half of a step."""
    w = torch.randn(256, 384, generator=torch.Generator().manual_seed(1)) / 10
    w[7, 3] = size
    mean_squares = torch.ones(384)
    mean_squares[3] = 1e-6
    q = quantize_by_importance(w, INT8, mean_squares).quantized
    assert 0.5 < float(q.dequantize()[7, 3] / size) < 0.6
    assert list(faults(w, q)) == []


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
    (found,) = faults(w, q)
    assert (found.kind, found.severity) == (CauseKind.DAMAGED, Severity.ERROR)
    assert found.evidence.startswith(f"{place_of(scheme)}: squared error ")
    again = list(faults(w, q, step=128))
    assert [str(one) for one in again] == [str(found)]


@pytest.mark.parametrize("factor", [1.5, 0.67])
@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
def test_a_scale_that_is_wrong_by_half_is_a_factor(scheme: Scheme, factor: float) -> None:
    w, q = spoiled(scheme)
    if q.zero_point is not None:
        q.zero_point[0, -1], q.codes[0, 256:] = 8, (w[0, 256:] / q.scale[0, -1].float()).round().clamp(-8, 7) + 8
    q.scale[0, -1] *= factor
    (found,) = faults(w, q)
    assert found.kind is CauseKind.SCALE_FACTOR
    assert "row 0" in found.evidence
    said = float(found.evidence.partition("values are ")[2].split()[0])
    assert said == pytest.approx(factor, rel=LIMITS["scale_factor"])


@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
def test_damage_beside_what_scales_give_up_is_found(scheme: Scheme) -> None:
    """Codes of a neighbour, and scales by which the codes were not chosen, each in a block that is cut off."""
    w, q = by_inputs(scheme, 1, 2.0, 0.0, False)
    cut = w.abs() > 1.1 * q.dequantize().abs().amax(1, keepdim=True)
    row = int(cut[8:-8].sum(1).argmax()) + 8
    wrong = replace(q, codes=q.codes.clone())
    wrong.codes[row, 64:80] = q.codes[row + 1, 64:80]
    (found,) = faults(w, wrong)
    assert found.kind is CauseKind.DAMAGED and found.evidence.startswith(f"row {row}")
    for factor in (2.0, 1.5, 0.67, 0.5):
        wrong = replace(q, scale=q.scale.clone())
        wrong.scale[row // 128 if scheme == FP8_BLOCK else row] *= factor
        assert {one.kind for one in faults(w, wrong)} & {CauseKind.SCALE_FACTOR, CauseKind.DAMAGED}, factor


def test_a_row_of_eight_bits_that_saturates_is_found() -> None:
    """Codes that were chosen for a scale of half of what the row needs: all but the largest values are right."""
    w = torch.randn(64, 384, generator=torch.Generator().manual_seed(1))
    q = quantize(w, INT8).quantized
    row = int(w.abs().amax(1).argmin())  # where half of the largest value is exceeded most often
    half = (q.scale[row].float() / 2).to(q.scale.dtype)
    q.scale[row], q.codes[row] = half, (w[row] / half.float()).round().clamp(-127, 127).to(torch.int8)
    (found,) = faults(w, q)
    assert found.evidence.startswith(f"row {row}")


def test_a_zero_row_that_holds_numbers() -> None:
    w, _ = spoiled(INT8)
    w[7] = 0
    q = quantize(w, INT8).quantized
    q.codes[7, 3] = 1
    (found,) = faults(w, q)
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
    table = torch.tensor(NF4_VALUES if kind == "nf4" else E2M1_VALUES)
    grid = Codebook(kind="nf4") if kind == "nf4" else Float(kind="e2m1")
    scheme = Scheme(grid=grid, blocking=Flat(size=64), scale=INT8.scale, activation=Activation())
    w = torch.randn(32, 128, generator=torch.Generator().manual_seed(0))
    blocks = w.view(-1, 64)
    scale = blocks.abs().amax(1) / table.max()
    codes = (blocks.unsqueeze(-1) / scale[:, None, None] - table).abs().argmin(-1).view_as(w).to(torch.uint8)
    q = QuantizedTensor(codes=codes, scale=scale, scheme=scheme, shape=(32, 128))
    assert list(faults(w, q)) == []
    codes[4, 64:] = codes[5, 64:].clone()
    (found,) = faults(w, q)
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
