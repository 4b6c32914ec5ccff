"""`export-onnx` and `run` as a user types them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from qconvert.cli.app import app
from qconvert.cli.demo import CHECKPOINT
from tests.checkpoints import make_tiny


def run(*arguments: str | Path) -> Result:
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


@pytest.fixture(scope="module")
def package(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The demo in int4."""
    out = tmp_path_factory.mktemp("package") / "int4"
    options = ("--scheme", "int4", "--group", "32", "--accuracy-level", "0", "--max-memory", "8GiB")
    done = run("export-onnx", CHECKPOINT, out, *options)
    assert done.exit_code == 0, done.output
    assert "not exported" not in done.output
    assert "qconvert run" in done.output
    return out


def test_a_package_answers_a_prompt_with_its_rates(package: Path) -> None:
    document = json.loads(run("run", package, "The river", "--max-tokens", "9", "--json").stdout)
    assert document["generated_tokens"] == len(document["tokens"]) <= 9
    assert document["prefill_tokens_per_second"] > 0
    shown = run("run", package, "The river", "--max-tokens", "9").stdout
    assert f"The river{document['text']}" in shown


@pytest.mark.parametrize("ops", ["standard", "functions"])
def test_other_operators_give_the_same_text(package: Path, tmp_path: Path, ops: str) -> None:
    asked = ("--scheme", "int4", "--group", "32", "--ops", ops)
    done = run("export-onnx", CHECKPOINT, tmp_path / "out", *asked)
    assert done.exit_code == 0, done.output
    assert ("ALLOW_RELEASED_ONNX_OPSET_ONLY" in done.output) == (ops == "standard")
    texts = [
        json.loads(run("run", folder, "The river", "--max-tokens", "9", "--json").stdout)["text"]
        for folder in (package, tmp_path / "out")
    ]
    assert texts[0] == texts[1]
    operators = {one["operator"] for one in json.loads(run("inspect", tmp_path / "out", "--json").stdout)["operators"]}
    assert ("GatedDeltaRule" in operators) == (ops == "functions")
    assert "LinearAttention" in operators or ops == "functions"
    assert run("verify", tmp_path / "out", "--deep", CHECKPOINT).exit_code == 0


def test_a_package_is_checked_against_its_manifest(package: Path) -> None:
    assert run("verify", package).exit_code == 0


def test_inspect_shows_operators_and_weights(package: Path) -> None:
    document = json.loads(run("inspect", package, "--json").stdout)
    counts = {one["operator"]: one["count"] for one in document["operators"]}
    assert (counts["QMoE"], counts["LinearAttention"], counts["Attention"]) == (4, 3, 1)
    weights = sum(path.stat().st_size for path in package.glob("*.safetensors"))
    assert 0 < weights - document["bytes"] < 100_000  # headers
    assert document["graphs"] == ["embedding.onnx", "model.onnx", "mtp.onnx", "vision.onnx"]
    shown = run("inspect", package).stdout
    assert "LinearAttention" in shown and "int4-g32-sym" in shown


@pytest.mark.parametrize("command", ["quantize", "export-onnx"])
def test_a_package_is_no_checkpoint(package: Path, tmp_path: Path, command: str) -> None:
    done = run(command, package, tmp_path / "out")
    assert done.exit_code == 3
    assert "is an ONNX package" in done.output


def test_a_dry_run_prints_the_plan_and_writes_nothing(tmp_path: Path) -> None:
    make_tiny(tmp_path / "source")
    asked = ("export-onnx", tmp_path / "source", tmp_path / "out", "--scheme", "int4", "--group", "32", "--dry-run")
    document = json.loads(run(*asked, "--json").stdout)
    formats = {step["role"]: step.get("format") for step in document["steps"]}
    assert formats["text.expert.down layer 0"] == "matmul-nbits"
    assert "int4-g32-sym" in run(*asked).stdout
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--group", "32"), "refine --scheme"),
        (("--scheme", "fp8"), "cannot be exported"),
        (("--accuracy-level", "3"), "expected 0 or 4"),
        (("--ops", "fast"), "expected one of contrib, standard, functions"),
        (("--scheme", "int8", "--group", "32"), "has no groups"),
    ],
)
def test_a_wrong_option_is_named(tmp_path: Path, options: tuple[str, ...], message: str) -> None:
    make_tiny(tmp_path / "source")
    done = run("export-onnx", tmp_path / "source", tmp_path / "out", *options)
    assert done.exit_code == 2
    assert message in done.output
    assert not (tmp_path / "out").exists()


def test_a_folder_that_is_no_package_is_named(tmp_path: Path) -> None:
    make_tiny(tmp_path / "source")
    (tmp_path / "source" / "tokenizer.json").write_bytes((CHECKPOINT / "tokenizer.json").read_bytes())
    done = run("run", tmp_path / "source", "text")
    assert done.exit_code == 3
    assert "model.onnx" in done.output


@pytest.mark.parametrize("options", [(), ("--scheme", "int8"), ("--scheme", "int4", "--group", "32", "--asymmetric")])
def test_a_package_is_shown_to_come_from_its_source(tmp_path: Path, options: tuple[str, ...]) -> None:
    make_tiny(tmp_path / "source")
    done = run("export-onnx", tmp_path / "source", tmp_path / "out", *options, "--max-shard-size", "200KB")
    assert done.exit_code == 0, done.output
    assert run("verify", tmp_path / "out", "--deep", tmp_path / "source").exit_code == 0
    make_tiny(tmp_path / "other", seed=1)
    assert run("verify", tmp_path / "out", "--deep", tmp_path / "other").exit_code == 1


def test_a_graph_that_was_changed_is_found(tmp_path: Path) -> None:
    make_tiny(tmp_path / "source")
    run("export-onnx", tmp_path / "source", tmp_path / "out")
    model = tmp_path / "out" / "model.onnx"
    model.write_bytes(model.read_bytes().replace(b"swiglu", b"swigla"))
    done = run("verify", tmp_path / "out")
    assert done.exit_code == 1
    assert "model.onnx" in done.output


def test_a_folded_package_is_made_checked_and_run(tmp_path: Path) -> None:
    asked = ("--scheme", "int4", "--group", "32", "--fold-shared-expert", "--max-memory", "8GiB")
    refused = run("export-onnx", CHECKPOINT, tmp_path / "out", *asked)
    assert refused.exit_code == 4
    assert "--preset fusable" in refused.output
    done = run("export-onnx", CHECKPOINT, tmp_path / "out", *asked, "--preset", "fusable")
    assert done.exit_code == 0, done.output
    assert run("verify", tmp_path / "out", "--deep", CHECKPOINT, "--max-memory", "8GiB").exit_code == 0
    assert json.loads(run("run", tmp_path / "out", "The river", "--max-tokens", "9", "--json").stdout)["text"]
    counts = {
        one["operator"]: one["count"]
        for one in json.loads(run("inspect", tmp_path / "out", "--json").stdout)["operators"]
    }
    assert counts["QMoE"] == 4
    assert "GatedAdd" not in counts
