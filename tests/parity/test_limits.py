"""A limit is judged, or it is said why not."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import pytest

from qconvert.core.errors import UsageError
from qconvert.core.metric import Verdict, exact
from qconvert.core.scheme import FP8, INT8
from qconvert.parity.limits import JUDGED, SHIPPED, Limit, bounds, in_force, judged, overridden, read_limits
from qconvert.parity.run import ParityOptions, compare
from qconvert.plan.policy import SCHEME_NAMES, scheme_named
from tests.conftest import Converted
from tests.edits import edit_tensors

WEIGHTS = ParityOptions(run_model=False)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, -1e-9])
@pytest.mark.parametrize("name", JUDGED)
def test_a_bound_that_judges_nothing_is_refused(name: str, value: float) -> None:
    with pytest.raises(UsageError, match=f"the limit {name} is "):
        bounds(**{name: value})


def test_zero_is_a_bound() -> None:
    assert [one.metric for one in bounds(**dict.fromkeys(JUDGED, 0.0))] == list(JUDGED)
    assert bounds(kl_mean=None) == ()


def test_every_number_of_a_report_can_be_judged_and_the_table_says_which_way(conversions: Converted) -> None:
    found = compare(*conversions(FP8), ParityOptions(tokens=64, window=32)).metrics
    assert {one.name for one in found} <= set(JUDGED)
    assert {one.name: one.better for one in found} == {one.name: JUDGED[one.name].better for one in found}
    for name in {one.name for one in found}:
        bound = 1e9 if JUDGED[name].better == "low" else 0.0
        numbers, unjudged = judged(found, bounds(**{name: bound}))
        assert unjudged == () and any(one.limit == bound for one in numbers), name


def test_limits_on_models_that_are_not_run_are_refused(conversions: Converted) -> None:
    with pytest.raises(UsageError, match="the limits kl_mean, router_overlap are on the models"):
        compare(*conversions(FP8), replace(WEIGHTS, limits=bounds(kl_mean=1.0, router_overlap=0.5, sqnr_min=1.0)))
    assert compare(*conversions(FP8), replace(WEIGHTS, limits=bounds(sqnr_min=1.0))).verdict is Verdict.PASS
    assert compare(*conversions(FP8), replace(WEIGHTS, limits=bounds(sqnr_min=90.0))).verdict is Verdict.FAIL


def test_a_limit_on_rounding_without_any_is_said_not_to_apply(conversions: Converted) -> None:
    original, _ = conversions(INT8)
    found = compare(original, original, replace(WEIGHTS, limits=bounds(sqnr_min=30.0)))
    assert found.verdict is Verdict.PASS
    assert found.notes[0] == "Nothing is quantized: there is no SQNR to report."
    assert "Not judged, for there is no such number: sqnr_min at least 30." in found.notes
    assert compare(original, original, WEIGHTS).notes == (found.notes[0], "The models were not run.")


def test_limits_that_an_incomplete_conversion_leaves_open_are_named(converted: Converted) -> None:
    original, out = converted(INT8)
    edit_tensors(out, lambda tensors: tensors.pop("model.language_model.norm.weight"))
    found = compare(original, out, ParityOptions(limits=bounds(kl_mean=1.0, top1_agreement=0.5)))
    assert found.verdict is Verdict.FAIL
    assert [one.metric for one in found.unjudged] == ["kl_mean", "top1_agreement"]


def test_a_limit_on_a_place_that_is_not_there_passes_nothing(conversions: Converted) -> None:
    limit = Limit(metric="kl_mean", bound=9.0, reason="asked", where="as served, domain prose")
    found = compare(*conversions(FP8), ParityOptions(tokens=64, window=32, limits=(limit,)))
    assert found.verdict is Verdict.AMBIGUOUS
    assert found.because == (
        "The limit kl_mean at most 9 of as served, domain prose judged nothing, for the report has no such number."
    )


def written(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "parity.toml"
    path.write_text(text, encoding="utf-8")
    return path


KL = '[[limit]]\nmetric = "kl_mean"\n'


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ('[[limit]]\nmetric = "kl_meen"\nat_most = 1\nreason = "r"\n', "limit 1: the metric 'kl_meen' is unknown"),
        (KL + 'at_most = 1\nreason = "r"\nseverity = 3\n', "unknown key 'severity'"),
        (KL + 'at_least = 1\nreason = "r"\n', "kl_mean takes 'at_most' and not 'at_least'"),
        (KL + "at_most = 1\n", "no 'reason'"),
        (KL + 'at_most = 1\nreason = " "\n', "no 'reason'"),
        (KL + 'at_most = "1"\nreason = "r"\n', "at_most is '1'; expected float"),
        (KL + 'at_most = true\nreason = "r"\n', "at_most is True; expected float"),
        (KL + 'at_most = nan\nreason = "r"\n', "must be a finite number"),
        ("limit = 3\n", "hold no"),
        ("", "hold no"),
        ("[limits]\nkl_mean = 1\n", "nothing else; found \\['limits'\\]"),
        ("[[limit]", "are not TOML"),
        ((KL + 'at_most = 1\nreason = "r"\n') * 2, "limit 2: kl_mean of 'as served' is bounded twice"),
    ],
)
def test_what_is_no_limit_is_refused_by_name(text: str, said: str, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=said):
        read_limits(written(tmp_path, text))


def test_a_file_that_is_not_there_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="cannot read limits"):
        read_limits(tmp_path / "parity.toml")


def limit(bound: float, scheme: str | None = None, where: str | None = None) -> Limit:
    return Limit(metric="kl_mean", bound=bound, reason=f"because {bound:g}", scheme=scheme, where=where)


def test_the_limit_of_a_scheme_goes_before_one_on_all_and_the_loosest_of_several_holds() -> None:
    limits = (limit(3.0), limit(1.0, "int8-*"), limit(2.0, "int4-g*"), limit(9.0, "fp8-*"))
    assert in_force(limits, {"int8-channel-sym"}) == (limits[1],)
    assert in_force(limits, {"int8-channel-sym", "int4-g128-sym"}) == (limits[2],)
    assert in_force(limits, {"mxfp4"}) == in_force(limits, set()) == (limits[0],)


def test_options_go_before_a_file() -> None:
    elsewhere = limit(1.0, where="weights only")
    assert overridden((limit(1.0, "int8-*"), elsewhere), bounds(kl_mean=5.0)) == (elsewhere, *bounds(kl_mean=5.0))


def test_a_limit_speaks_of_every_layer_and_the_stricter_of_two_holds() -> None:
    layers = [exact("router_overlap", "as served", 0.9, layer=layer, better="high") for layer in range(3)]
    strict = Limit(metric="router_overlap", bound=0.8, reason="r", where="as *")
    numbers, unjudged = judged(layers, (*bounds(router_overlap=0.5), strict))
    assert [one.limit for one in numbers] == [0.8] * 3
    assert {one.reason for one in numbers} == {"r"}
    assert unjudged == ()
    strict = Limit(metric="kl_mean", bound=0.1, reason="r", where="as *")
    numbers, _ = judged([exact("kl_mean", "as served", 0.2)], (*bounds(kl_mean=0.5), strict))
    assert [(one.limit, one.verdict) for one in numbers] == [(0.1, Verdict.FAIL)]


def test_the_shipped_limits_know_every_scheme_and_say_why() -> None:
    shipped = read_limits(SHIPPED)
    for name in SCHEME_NAMES:
        known = {one.metric for one in in_force(shipped, {str(scheme_named(name))}) if one.scheme is not None}
        assert {"kl_mean", "top1_agreement", "perplexity_ratio"} <= known, name
    assert all("qconvert demo --scheme" in one.reason for one in shipped)
