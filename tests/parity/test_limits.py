"""A limit is judged, or it is said why not."""

from __future__ import annotations

import math
from dataclasses import fields, replace

import pytest

from qconvert.core.errors import UsageError
from qconvert.core.metric import Verdict
from qconvert.core.scheme import FP8, INT8
from qconvert.parity.limits import Limits
from qconvert.parity.run import ParityOptions, compare
from tests.conftest import Converted
from tests.edits import edit_tensors

NAMES = [one.name for one in fields(Limits)]
WEIGHTS = ParityOptions(run_model=False)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, -1e-9])
@pytest.mark.parametrize("name", NAMES)
def test_a_bound_that_judges_nothing_is_refused(name: str, value: float) -> None:
    with pytest.raises(UsageError, match=f"the limit {name} is "):
        Limits(**{name: value})


def test_zero_is_a_bound() -> None:
    assert Limits(**dict.fromkeys(NAMES, 0.0)).given() == tuple(NAMES)
    assert Limits().given() == ()


def test_limits_on_models_that_are_not_run_are_refused(conversions: Converted) -> None:
    with pytest.raises(UsageError, match="the limits kl_mean, router_overlap are on the models"):
        compare(*conversions(FP8), replace(WEIGHTS, limits=Limits(kl_mean=1.0, router_overlap=0.5, sqnr_min=1.0)))
    assert compare(*conversions(FP8), replace(WEIGHTS, limits=Limits(sqnr_min=1.0))).verdict is Verdict.PASS
    assert compare(*conversions(FP8), replace(WEIGHTS, limits=Limits(sqnr_min=90.0))).verdict is Verdict.FAIL


def test_a_limit_on_rounding_without_any_is_said_not_to_apply(conversions: Converted) -> None:
    original, _ = conversions(INT8)
    found = compare(original, original, replace(WEIGHTS, limits=Limits(sqnr_min=30.0)))
    assert found.notes[0] == (
        "Nothing is quantized: there is no SQNR to report, and the limit sqnr_min does not apply."
    )
    assert "does not apply" in found.to_markdown()
    assert compare(original, original, WEIGHTS).notes[0] == "Nothing is quantized: there is no SQNR to report."


def test_limits_that_an_incomplete_conversion_leaves_open_are_named(converted: Converted) -> None:
    original, out = converted(INT8)
    edit_tensors(out, lambda tensors: tensors.pop("model.language_model.norm.weight"))
    found = compare(original, out, ParityOptions(limits=Limits(kl_mean=1.0, top1=0.5)))
    assert found.verdict is Verdict.FAIL
    assert "Not judged: kl_mean, top1." in found.notes
