"""Error feedback gives the codes of the textbook, the bits of the plain loop, and never loses to the nearest codes."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from qconvert.core.errors import DataError, FormatError
from qconvert.core.quantized import QuantizedTensor
from qconvert.core.scheme import LLM_INT8, NVFP4, Group, Int, Scheme, bnb4
from qconvert.numerics import gptq as module
from qconvert.numerics.gptq import Columns, gptq, loop_compiled, loop_with_torch, row_losses, with_feedback
from qconvert.numerics.gptq_kernels import STRIP, feed_back
from qconvert.numerics.hessian import Factor, Moments, Support, blended, factorize, no_moments
from qconvert.numerics.importance import quantize_by_importance
from qconvert.numerics.rounding import quantize, second_scale_for
from qconvert.numerics.rounding_rule import Rule
from tests.numerics import textbook_gptq
from tests.numerics.matrices import SCHEMES as ALL
from tests.numerics.matrices import quick
from tests.numerics.test_hessian import DEGENERATE
from tests.tolerances import tolerances

LIMITS = tolerances("calibrated")
SCHEMES: dict[str, Scheme] = {**ALL, "int3-g8": replace(ALL["int4-g8"], grid=Int(bits=3)), "nvfp4": NVFP4}
each_scheme = pytest.mark.parametrize("name", SCHEMES)
each_grid = pytest.mark.parametrize(
    "name", ("int4-g8", "int4-asym", "int8-tensor", "int8-block", "fp8", "fp8-block-edges", "mxfp4-g8", "nvfp4")
)


def correlated(tokens: int, inputs: int, seed: int = 0) -> Tensor:
    gen = torch.Generator().manual_seed(seed)
    mixing = torch.randn(inputs, inputs, generator=gen) / inputs**0.5
    return torch.randn(tokens, inputs, generator=gen) @ (mixing + 0.5 * torch.eye(inputs)) + 0.3


def problem(scheme: Scheme, seed: int = 0, rows: int = 9, cols: int = 48) -> tuple[Tensor, Moments, float]:
    """Weights, well-conditioned inputs, and the second scale."""
    w = torch.randn(rows, cols, generator=torch.Generator().manual_seed(seed)).bfloat16()
    return w, no_moments(cols).add(correlated(400, cols, seed)), second_scale_for(scheme, float(w.abs().max()))


def same(a: QuantizedTensor, b: QuantizedTensor) -> bool:
    parts = [(a.codes, b.codes), (a.scale, b.scale)]
    if a.zero_point is not None and b.zero_point is not None:
        parts.append((a.zero_point, b.zero_point))
    return all(torch.equal(p.contiguous().view(torch.uint8), q.contiguous().view(torch.uint8)) for p, q in parts)


@pytest.mark.parametrize("by_size", [False, True], ids=["in order", "by size"])
@each_scheme
def test_the_codes_of_the_textbook(name: str, by_size: bool) -> None:
    scheme = SCHEMES[name]
    w, seen, second = problem(scheme)
    factor = factorize(blended(seen), by_size=by_size)
    start = quantize(w, scheme, search=True, second=second).quantized
    ours, losses = with_feedback(w, start, factor)
    h = seen.hessian()
    for other in (textbook_gptq.by_inverse, textbook_gptq.by_solving):
        theirs = other(w, start, h, 0.01, factor.order)
        equal = torch.isclose(ours.dequantize().double(), theirs, rtol=1e-6, atol=0).all(1)
        # What lies on a half within float32's error may go either way, and changes the rest of its row.
        assert int(equal.sum()) >= 8
        expected = textbook_gptq.loss(w, theirs, h, 0.01)
        torch.testing.assert_close(losses[equal], expected[equal], rtol=LIMITS["loss"], atol=0)
    nearest = row_losses(start.dequantize() - w.float(), factor)
    expected = textbook_gptq.loss(w, start.dequantize(), h, 0.01)
    torch.testing.assert_close(nearest, expected, rtol=LIMITS["loss"], atol=0)


@each_grid
@quick
@given(seed=st.integers(0, 2**31), kind=st.sampled_from(("normal", "ties", "huge feedback", "zeros")))
def test_the_compiled_loop_has_the_bits_of_the_plain_one(name: str, seed: int, kind: str) -> None:
    gen = torch.Generator().manual_seed(seed)
    rows, cols, groups = STRIP + 5, 16, 3
    rule = Rule(scheme=SCHEMES[name])
    w = torch.randn(cols, rows, generator=gen)
    scale = torch.rand(groups, rows, generator=gen) + 0.05
    if kind == "ties":
        w, scale = torch.randint(-30, 31, (cols, rows), generator=gen) / 4.0, torch.ones(groups, rows)
    zero = torch.zeros(groups, rows)
    if not rule.scheme.symmetric:
        zero = torch.randint(-8, 8, (groups, rows), generator=gen).float()
    unit = torch.eye(cols) + torch.randn(cols, cols, generator=gen).triu(1) * (30.0 if kind == "huge feedback" else 0.3)
    group = torch.randint(groups, (cols,), generator=gen)
    target = torch.zeros(cols, rows) if kind == "zeros" else w + torch.randn(cols, rows, generator=gen) * 0.1
    pivots = torch.rand(cols, generator=gen)
    run = Columns(w=w, target=target, unit=unit, pivots=pivots, scale=scale, zero=zero, group=group)
    runs = [loop(run, rule) for loop in (loop_compiled, loop_with_torch)]
    assert torch.equal(*(rule.codes(values).view(torch.uint8) for values, _, _ in runs))
    for ours, plain in zip(*runs, strict=True):
        assert bool(ours.isfinite().all()) and torch.equal(ours, plain)


@pytest.mark.parametrize(
    ("kind", "scales"),
    [*((kind, "weighted") for kind in DEGENERATE), ("ordinary", "largest"), ("ordinary", "searched")],
)
@each_grid
def test_no_row_loses_to_rounding_to_nearest(name: str, kind: str, scales: module.Scales) -> None:
    scheme = SCHEMES[name]
    w, _, second = problem(scheme, seed=3)
    w[2] *= 100.0
    w[3, ::5] = 0.0
    w[4] = 0.0
    x = DEGENERATE[kind](correlated(99, 48))
    factor = factorize(blended(no_moments(48).add(x)))
    found = gptq(w, scheme, factor, scales=scales, second=second)
    error = found.quantized.dequantize() - w.float()
    assert bool(error.isfinite().all()) and 0 <= found.rows_left <= 9
    assert found.loss <= found.nearest_loss
    slack = LIMITS["loss"] * found.nearest_loss
    assert found.loss == pytest.approx(float(row_losses(error, factor).sum()), abs=slack)
    nearest = quantize(w, scheme, search=scales != "largest", second=second).quantized
    if scales == "weighted":
        nearest = quantize_by_importance(w, scheme, factor.importance, second=second).quantized
    before, after = row_losses(nearest.dequantize() - w.float(), factor), row_losses(error, factor)
    if "block" not in name and "tensor" not in name:
        assert bool((after <= before * (1 + LIMITS["loss"])).all())
    if factor.support is Support.NONE:
        assert same(found.quantized, nearest) and found.rows_left == 9


def diagonal(values: Tensor) -> Factor:
    return replace(factorize(blended(no_moments(len(values)))), pivots=values, support=Support.OWN, diagonal=values)


@each_scheme
def test_inputs_that_do_not_go_together_leave_nothing_to_make_up_for(name: str) -> None:
    scheme = SCHEMES[name]
    w, _, second = problem(scheme)
    start = quantize(w, scheme, search=True, second=second).quantized
    again, _ = with_feedback(w, start, diagonal(torch.rand(48) + 0.1))
    assert torch.equal(again.dequantize(), start.dequantize())
    found = gptq(w, scheme, diagonal(torch.ones(48)), second=second)
    assert same(found.quantized, start) and found.loss == found.nearest_loss


def test_rows_beyond_repair_are_rounded_to_nearest() -> None:
    w = torch.randn(3, 16, generator=torch.Generator().manual_seed(0))
    unit = torch.eye(16) + torch.full((16, 16), 1e30).triu(1)
    factor = replace(diagonal(torch.ones(16)), unit=unit)
    found = gptq(w, ALL["int4-g8"], factor)
    assert found.rows_left == 3
    assert same(found.quantized, quantize(w, ALL["int4-g8"], search=True).quantized)


@pytest.mark.parametrize("columns", [1, 7, 16, 48])
def test_how_columns_are_blocked_changes_no_code(columns: int, monkeypatch: pytest.MonkeyPatch) -> None:
    scheme = ALL["int4-asym"]
    w, seen, _ = problem(scheme, seed=5)
    whole = gptq(w, scheme, factorize(blended(seen)))
    monkeypatch.setattr(module, "COLUMNS", columns)
    cut = gptq(w, scheme, factorize(blended(seen)))
    assert same(cut.quantized, whole.quantized)
    assert cut.loss == pytest.approx(whole.loss, rel=LIMITS["loss"])


def test_the_number_of_threads_changes_no_bit() -> None:
    w, before = torch.randn(300, 384, generator=torch.Generator().manual_seed(0)), torch.get_num_threads()
    factor = factorize(blended(no_moments(384).add(correlated(500, 384))))
    try:
        runs = []
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            runs.append(gptq(w, ALL["int4-g8"], factor))
            assert torch.get_num_threads() == threads
    finally:
        torch.set_num_threads(before)
    assert all(same(run.quantized, runs[0].quantized) and run.loss == runs[0].loss for run in runs)


def test_any_float_type_and_stride() -> None:
    w, seen, _ = problem(ALL["int4-g8"], rows=24)
    factor = factorize(blended(seen))
    whole = gptq(w, ALL["int4-g8"], factor)
    for other in (w.double(), w.float(), w.T.contiguous().T):
        assert same(gptq(other, ALL["int4-g8"], factor).quantized, whole.quantized)
    # Two processes that compile one kernel for two types of arguments at once could mix them up on disk.
    assert len(feed_back.compiled.signatures) == 1


def test_outputs_are_kept_where_inputs_go_together() -> None:
    w, seen, _ = problem(ALL["int4-g8"], rows=64)
    found = gptq(w, ALL["int4-g8"], factorize(blended(seen)))
    assert found.loss < 0.7 * found.nearest_loss and found.rows_left < 4


def test_what_is_not_available_says_so() -> None:
    scheme = ALL["int4-g8"]
    w, seen, _ = problem(scheme)
    factor = factorize(blended(seen))
    start = quantize(w, scheme).quantized
    with pytest.raises(FormatError, match="not consecutive"):
        with_feedback(w, replace(start, column_group=torch.arange(48) // 8), factor)
    for other in (bnb4("nf4"), LLM_INT8):
        with pytest.raises(FormatError, match="not available"):
            gptq(w, other, factor, scales="searched")
    with pytest.raises(ValueError, match="a Hessian of 48 inputs"):
        with_feedback(w[:, :40], quantize(w[:, :40], scheme).quantized, factor)
    with pytest.raises(ValueError, match="groups of 7 do not divide"):
        gptq(w, replace(scheme, blocking=Group(size=7)), factor)
    w[1, 1] = torch.nan
    with pytest.raises(DataError, match="1 NaN"):
        gptq(w, scheme, factor)
