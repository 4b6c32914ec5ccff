"""`qconvert check` as a user types it, and `quantize` that holds its own output to the rules."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from qconvert import convert as module
from qconvert.cli.app import app
from qconvert.convert import convert
from qconvert.core.errors import OutputError, PlanError
from qconvert.core.scheme import FP8_BLOCK, MXFP4, int4
from qconvert.formats import quantization_config
from qconvert.plan.policy import default_policy
from tests.checkpoints import make_tiny
from tests.edits import edit_quantization


def run(*arguments: str | Path) -> Result:
    return CliRunner().invoke(app, ["check", *map(str, arguments)])


@pytest.fixture
def source(tmp_path: Path) -> Path:
    make_tiny(tmp_path / "src")
    return tmp_path / "src"


@pytest.fixture
def out(source: Path) -> Path:
    return convert(source, source.with_name("out"), default_policy(int4(32)), max_memory=4 << 30).out


def test_what_we_write_has_no_fault(out: Path) -> None:
    shown = run(out)
    assert shown.exit_code == 0 and "no fault" in shown.stdout
    assert "vLLM 0.32, transformers 5.23, SGLang 0.5.23" in shown.stdout


def test_an_original_has_no_fault(source: Path) -> None:
    assert run(source).exit_code == 0


def test_every_violation_is_told_at_once_with_engine_module_and_remedy(out: Path) -> None:
    edit_quantization(out, ignore=[])
    shown = run(out)
    assert shown.exit_code == 1
    said = (
        "vLLM 0.32, vllm-ignore (run)",
        "SGLang 0.5.23, sglang-ignore (read, not run)",
        "layers.*.linear_attn.in_proj_ba (2)",
    )
    for word in (*said, "add its full name"):
        assert word in shown.stdout, word
    document = json.loads(run(out, "--engine", "vllm", "--tp", "4", "--json").stdout)
    assert document["engines"] == ["vLLM 0.32"] and document["tp"] == 4
    assert {one["rule"] for one in document["violations"]} == {
        "vllm-ignore", "vllm-tp-heads", "vllm-expert-groups",
    }  # fmt: skip
    assert all(one["source"] and one["modules"] for one in document["violations"])
    assert document["faults"] == len(document["violations"])


def test_a_limit_alone_is_no_fault(source: Path) -> None:
    out = convert(source, source.with_name("mxfp4"), default_policy(MXFP4), max_memory=4 << 30).out
    shown = run(out, "--engine", "vllm")
    assert shown.exit_code == 0 and "loads, with a limit" in shown.stdout


def test_a_format_that_cannot_be_read_is_an_error_of_the_source(out: Path) -> None:
    edit_quantization(out, quant_method="hqq")
    assert run(out).exit_code == 3


def test_a_broken_pattern_is_an_error_of_the_source(tmp_path: Path) -> None:
    make_tiny(tmp_path / "large", group=128)
    out = convert(tmp_path / "large", tmp_path / "fp8", default_policy(FP8_BLOCK), max_memory=4 << 30).out
    edit_quantization(out, modules_to_not_convert=["model.layers.(0"])
    shown = run(out)
    assert shown.exit_code == 3 and "model.layers.(0" in shown.output


def test_a_plan_that_engines_would_misread_is_refused_before_anything_is_written(
    source: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(quantization_config, "ignore_list", lambda decisions: [])
    with pytest.raises(PlanError, match="vllm-ignore"):
        convert(source, source.with_name("out"), default_policy(int4(32)), max_memory=4 << 30)
    assert os.listdir(source.parent) == ["src"]


def test_an_output_that_engines_would_misread_does_not_appear(source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(quantization_config, "ignore_list", lambda decisions: [])
    monkeypatch.setattr(module, "refuse_unreadable_plan", lambda plan, source: None)
    with pytest.raises(OutputError, match="nothing has appeared"):
        convert(source, source.with_name("out"), default_policy(int4(32)), max_memory=4 << 30)
    assert not source.with_name("out").exists()
