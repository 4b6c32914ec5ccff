"""A whole comparison: verdicts, notes, files."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path

import pytest

from qconvert.core.errors import OutputError, SourceError
from qconvert.core.metric import Verdict, exact
from qconvert.core.scheme import FP8, INT8, int4
from qconvert.parity.limits import Limit, bounds
from qconvert.parity.outputs.document import as_document
from qconvert.parity.outputs.folder import write_report
from qconvert.parity.outputs.markdown import as_markdown
from qconvert.parity.report import ParityReport
from qconvert.parity.run import ParityOptions, compare
from tests.conftest import Converted
from tests.edits import edit_tensors
from tests.tolerances import tolerances

LIMITS = tolerances("parity")


FEW = ParityOptions(tokens=128, window=32)


@pytest.fixture(scope="module")
def report(conversions: Converted) -> ParityReport:
    return compare(*conversions(FP8), FEW)


def test_a_right_conversion_passes(report: ParityReport) -> None:
    assert report.verdict is Verdict.PASS
    assert report.causes == ()
    assert report.tokens == 124
    plain, served = (report.metric("kl_mean", mode).value for mode in ("weights only", "as served"))
    assert 0 < plain < served < LIMITS["random_kl_mean"]
    pooled = report.metric("sqnr", "all quantized tensors").value
    assert pooled == pytest.approx(LIMITS["sqnr_fp8"], abs=LIMITS["sqnr_fp8_apart"])
    assert report.bytes_converted < report.bytes_original
    assert len(report.tensors) == 54
    assert {one.path for one in report.roles[:3]} == {"text.expert.gate", "text.expert.up", "text.expert.down"}
    assert [one.sums.sqnr_db for one in report.tensors] == sorted(one.sums.sqnr_db for one in report.tensors)


def test_json_is_strict_and_complete(report: ParityReport, tmp_path: Path) -> None:
    path, markdown, *_ = write_report(report, tmp_path / "deep" / "report")
    parsed = json.loads(path.read_text(encoding="utf-8"), parse_constant=lambda word: pytest.fail(word))
    assert parsed["schema"] == "qconvert-parity/2"
    assert parsed["verdict"] == "pass"
    assert parsed == as_document(report)
    assert len(parsed["metrics"]) == len(report.metrics)
    keys = {"name", "where", "layer", "value", "low", "high", "unit", "limit", "reason", "better", "verdict"}
    assert keys == set(parsed["metrics"][0])
    assert markdown.read_text(encoding="utf-8") == as_markdown(report)
    assert sorted(p.name for p in path.parent.iterdir()) == [
        "junit.xml", "model-card.md", "parity.json", "parity.md", "report.html",
    ]  # fmt: skip


def test_markdown_puts_causes_before_numbers(conversions: Converted, converted: Converted) -> None:
    original, out = converted(INT8)
    scale = "model.language_model.layers.0.mlp.experts.2.down_proj.weight_scale"
    edit_tensors(out, lambda tensors: tensors[scale][7].mul_(2))
    found = compare(original, out, FEW)
    assert found.verdict is Verdict.FAIL
    text = as_markdown(found)
    places = [
        text.index(part) for part in ("# Parity: fail", "layer 0 expert 2 down: row 7", "| kl_mean |", "## Worst")
    ]
    assert places == sorted(places)
    assert text.index("layers.0.mlp.experts.2.down_proj") < text.index("layers.1.")


def test_limits_apply_to_the_model_as_served(conversions: Converted, report: ParityReport) -> None:
    served = report.metric("kl_mean", "as served")
    found = compare(*conversions(FP8), replace(FEW, limits=bounds(kl_mean=served.low / 2, kl_median=1.0)))
    assert found.metric("kl_mean", "as served").verdict is Verdict.FAIL
    assert found.metric("kl_median", "as served").verdict is Verdict.PASS
    assert found.metric("kl_mean", "weights only").limit is None
    assert found.verdict is Verdict.FAIL
    found = compare(*conversions(FP8), replace(FEW, limits=bounds(kl_mean=served.value)))
    assert found.verdict is Verdict.AMBIGUOUS


@pytest.mark.parametrize(
    ("limits", "verdict"),
    [
        (bounds(sqnr_min=35), Verdict.FAIL),
        (bounds(sqnr_min=30), Verdict.PASS),
        (bounds(router_overlap=1.01), Verdict.FAIL),
        (bounds(top1_agreement=0.0), Verdict.PASS),
        (bounds(top1_agreement=1.01), Verdict.FAIL),
        (bounds(perplexity_ratio=0.5), Verdict.FAIL),
    ],
)
def test_every_limit_can_fail_a_report(limits: tuple[Limit, ...], verdict: Verdict, conversions: Converted) -> None:
    assert compare(*conversions(FP8), replace(FEW, limits=limits)).verdict is verdict


def test_weights_alone(conversions: Converted) -> None:
    found = compare(*conversions(int4(32)), replace(FEW, run_model=False))
    assert found.tokens == 0
    assert found.verdict is Verdict.PASS
    assert {metric.name for metric in found.metrics} == {
        "sqnr", "sqnr_min", "cosine_min", "bits_per_weight", "zero_codes", "zero_codes_max", "clipped_codes",
        "clipped_codes_max", "dead_scales",
    }  # fmt: skip
    assert "not run" in found.notes[0]
    assert "not run" in as_markdown(found)


def test_an_incomplete_conversion_is_reported_and_not_run(converted: Converted) -> None:
    original, out = converted(int4(32))
    edit_tensors(out, lambda tensors: tensors.pop("model.language_model.norm.weight"))
    found = compare(original, out, FEW)
    assert found.verdict is Verdict.FAIL
    assert "model.language_model.norm.weight" in found.causes[0].evidence
    assert found.tokens == 0


def test_a_missing_expert_scale_is_reported(converted: Converted) -> None:
    original, out = converted(int4(32))
    name = "model.language_model.layers.1.mlp.experts.0.up_proj.weight_scale"
    edit_tensors(out, lambda tensors: tensors[name].fill_(math.nan))
    found = compare(original, out, FEW)
    assert found.causes[0].kind.value == "bad_scale"
    assert "NaN" not in json.dumps(as_document(found))


def test_a_configuration_that_changed_is_named(converted: Converted) -> None:
    original, out = converted(int4(32))
    config = json.loads((out / "config.json").read_text(encoding="utf-8"))
    config["text_config"]["rope_parameters"]["rope_theta"] = 10_000.0
    (out / "config.json").write_text(json.dumps(config), encoding="utf-8")
    found = compare(original, out, replace(FEW, run_model=False))
    assert found.verdict is Verdict.FAIL
    assert str(found.causes[0]).startswith("config.json: rope is")


def test_another_size_is_named_and_not_run(conversions: Converted) -> None:
    original, _ = conversions(int4(32))
    _, other = conversions(int4(32), experts=5)
    found = compare(original, other, FEW)
    assert found.verdict is Verdict.FAIL
    assert found.causes[0].evidence == "num_experts is 5, the original has 6"
    assert found.tokens == 0


def test_no_checkpoint_is_an_error(conversions: Converted, tmp_path: Path) -> None:
    with pytest.raises(SourceError):
        compare(conversions(FP8)[0], tmp_path, FEW)


def test_a_report_that_cannot_be_written_is_an_error(report: ParityReport, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("", encoding="utf-8")
    with pytest.raises(OutputError, match="cannot write"):
        write_report(report, tmp_path / "file")


def test_numbers_that_json_lacks(report: ParityReport) -> None:
    odd = replace(report, metrics=(exact("a", "b", math.inf), exact("c", "d", math.nan)))
    assert [metric["value"] for metric in as_document(odd)["metrics"]] == ["inf", None]
    json.dumps(as_document(odd), allow_nan=False)
