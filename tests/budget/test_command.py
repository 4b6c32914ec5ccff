"""`qconvert quantize` with a budget, as a user types it."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner, Result

from qconvert.budget.parts import Part
from qconvert.cli.app import app
from qconvert.convert import convert
from qconvert.core.dtypes import DType
from qconvert.core.scheme import FP8
from qconvert.io.checkpoint import Checkpoint
from qconvert.io.file_record import record_file
from qconvert.io.hashing import SHA256
from qconvert.plan.policy import default_policy
from tests.budget.known import known, usual
from tests.checkpoints import make_tiny


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("command") / "src"
    make_tiny(folder)
    known(folder, folder.parent / "known.json")
    return folder


def run(source: Path, out: Path, *arguments: str | Path) -> Result:
    whole = ("quantize", source, out, "--max-memory", "8GiB", *arguments)
    return CliRunner().invoke(app, [str(argument) for argument in whole])


def measured(source: Path) -> tuple[str, Path]:
    return "--sensitivities", source.parent / "known.json"


def weights(folder: Path) -> dict[str, str]:
    return {path.name: record_file(path, SHA256).digest for path in sorted(folder.glob("*.safetensors"))}


def test_a_dry_run_shows_the_decision_and_writes_it_beside(source: Path, tmp_path: Path) -> None:
    shown = run(source, tmp_path / "out", "--bits", "6", *measured(source), "--dry-run")
    assert shown.exit_code == 0, shown.output
    for text in ("routed experts", "linear attention qkv, z", "6 bits per weight", "least possible", "another 1 MB"):
        assert text in shown.output
    assert not (tmp_path / "out").exists()
    assert [path.name for path in tmp_path.iterdir()] == ["out.policy.toml"]
    beside = {path.name for path in source.parent.iterdir()} - {"src"}
    assert beside == {"known.json", "known.frontier.json", "known.frontier.svg"}


def test_a_dry_run_tells_machines_what_its_tables_say(source: Path, tmp_path: Path) -> None:
    np.save(tmp_path / "ids.npy", np.random.default_rng(0).integers(0, 400, 96))
    text = ("--calibration-data", tmp_path / "ids.npy", "--calibration-tokens", "96", "--calibration-window", "24")
    asked = ("--target-size", "1.1MB", *measured(source), "--method", "gptq", *text)
    shown = run(source, tmp_path / "out", *asked, "--dry-run", "--json")
    assert shown.exit_code == 0, shown.output
    told = json.loads(shown.stdout)
    budget = told["budget"]
    assert budget["sensitivities"] == {"file": str(source.parent / "known.json"), "measured_now": 0}
    assert budget["kl_per_byte"] > 0 and len(budget["frontier"]) > 1 and "all int8" in budget["uniform"]
    assert set(told["needs"]) == {"work", "waiting", "kept"} and min(told["needs"].values()) > 0
    done = run(source, tmp_path / "out", *asked, "--json")
    assert done.exit_code == 0, done.output
    written = json.loads(done.stdout)
    assert (written["budget"], written["engine_limits"]) == (budget, told["engine_limits"])
    assert written["policy_hash"] == told["policy_hash"]
    chosen = {(part["group"], part["layer"]): part["scheme"] for part in budget["parts"]}
    steps = {step["role"]: step["action"] for step in told["steps"]}
    assert steps["text.expert.up layer 1 expert 2"] == f"{chosen['routed experts', 1]}-sym"


def test_a_dry_run_says_what_it_measured(source: Path, tmp_path: Path) -> None:
    np.save(tmp_path / "ids.npy", np.random.default_rng(0).integers(0, 400, 96))
    text = ("--calibration-data", tmp_path / "ids.npy", "--sensitivity-tokens", "48", "--calibration-window", "24")
    asked = ("--bits", "9", "--candidates", "int8", *text, "--dry-run")
    first, again = (run(source, tmp_path / "out", *asked) for _ in range(2))
    assert first.exit_code == again.exit_code == 0, first.output + again.output
    assert "measured now, the others kept in" in " ".join(first.output.split())
    assert "sensitivities: all kept in" in " ".join(again.output.split())


def test_its_policy_file_gives_the_same_bytes(source: Path, tmp_path: Path) -> None:
    done = run(source, tmp_path / "out", "--target-size", "1.1MB", "--search", "--json", *measured_searched(source))
    assert done.exit_code == 0, done.output
    said = json.loads(done.stdout)["budget"]
    assert sum(path.stat().st_size for path in (tmp_path / "out").glob("*.safetensors")) <= 1_100_000
    assert said["proven"] and said["bits"] < 16 and len(said["files"]) == 4
    again = run(source, tmp_path / "again", "--policy", tmp_path / "out.policy.toml")
    assert again.exit_code == 0, again.output
    assert weights(tmp_path / "again") == weights(tmp_path / "out")


def measured_searched(source: Path) -> tuple[str, Path]:
    known(source, source.parent / "searched.json", search=True)
    return "--sensitivities", source.parent / "searched.json"


def text_of(folder: Path) -> tuple[str | Path, ...]:
    np.save(folder / "ids.npy", np.random.default_rng(0).integers(0, 400, 96))
    return "--calibration-data", folder / "ids.npy", "--calibration-tokens", "96", "--calibration-window", "24"


def test_a_fold_for_which_a_budget_leaves_nothing_is_left_out_with_a_warning(source: Path, tmp_path: Path) -> None:
    def loss(part: Part, scheme: str) -> float:
        return usual(part, scheme) * (1e6 if part.group == "linear attention output" else 1.0)

    known(source, tmp_path / "known.json", loss=loss)
    budget = ("--bits", "8", "--sensitivities", tmp_path / "known.json", *text_of(tmp_path))
    done = run(source, tmp_path / "out", *budget, "--method", "awq", "--awq-folds", "input,linear-norm", "--json")
    assert done.exit_code == 0, done.output
    said = json.loads(done.stdout)
    assert said["calibration"]["folds"] == "input"
    (warning,) = [one for one in said["warnings"] if "folded" in one]
    assert "linear-norm is not folded: within 8 bits per weight" in warning and "linear_attention.output" in warning
    again = run(source, tmp_path / "again", *budget, "--method", "awq", "--awq-folds", "linear-norm", "--dry-run")
    assert again.exit_code == 0 and "warning: linear-norm is not folded" in again.output


def test_a_fold_that_no_budget_can_use_is_refused_before_it_is_measured(source: Path, tmp_path: Path) -> None:
    policy = tmp_path / "policy.toml"
    policy.write_text('[[rule]]\nmatch = "text.linear_attention.output"\nkeep = true\n')
    ways = ("--bits", "8", "--method", "awq", "--awq-folds", "linear-norm")
    refused = run(source, tmp_path / "out", "--policy", policy, *ways, *text_of(tmp_path))
    assert refused.exit_code == 4
    assert "'linear-norm' rounds nothing more finely" in refused.stderr
    assert {path.name for path in tmp_path.iterdir()} == {"policy.toml", "ids.npy"}


@pytest.mark.parametrize("method", ["gptq", "awq"])
def test_the_method_of_rounding_is_another_question(method: str, source: Path, tmp_path: Path) -> None:
    np.save(tmp_path / "ids.npy", np.random.default_rng(0).integers(0, 400, 96))
    text = ("--calibration-data", tmp_path / "ids.npy", "--calibration-tokens", "96", "--calibration-window", "24")
    budget = ("--target-size", "1.1MB", *measured(source))
    done = run(source, tmp_path / "out", *budget, "--method", method, *text)
    assert done.exit_code == 0, done.output
    assert sum(path.stat().st_size for path in (tmp_path / "out").glob("*.safetensors")) <= 1_100_000
    deep = ("--deep", source, "--calibration-data", tmp_path / "ids.npy", "--max-memory", "8GiB")
    verified = CliRunner().invoke(app, list(map(str, ("verify", tmp_path / "out", *deep))))
    assert verified.exit_code == 0, verified.output


def test_statistics_decide_scales_within_a_budget_too(source: Path, tmp_path: Path) -> None:
    np.save(tmp_path / "ids.npy", np.random.default_rng(0).integers(0, 400, 192))
    text = ("--text", tmp_path / "ids.npy", "--tokens", "192", "--window", "24")
    made = CliRunner().invoke(app, list(map(str, ("calibrate", source, "-o", tmp_path / "stats", *text))))
    assert made.exit_code == 0, made.output
    stats = ("--stats", tmp_path / "stats")
    budget = ("--target-size", "1.1MB", *measured_searched(source))
    done = run(source, tmp_path / "out", *budget, "--method", "imatrix", *stats)
    assert done.exit_code == 0, done.output
    assert sum(path.stat().st_size for path in (tmp_path / "out").glob("*.safetensors")) <= 1_100_000
    assert "by the mean squares of its inputs" in (tmp_path / "out" / "manifest.json").read_text()
    deep = ("--deep", source, *stats, "--max-memory", "8GiB")
    verified = CliRunner().invoke(app, list(map(str, ("verify", tmp_path / "out", *deep))))
    assert verified.exit_code == 0, verified.output


def test_a_quantized_source_is_rounded_anew_within_a_budget(source: Path, tmp_path: Path) -> None:
    fp8 = tmp_path / "fp8"
    convert(source, fp8, default_policy(FP8), jobs=1, max_memory=8 << 30)
    known(fp8, tmp_path / "fp8.json")
    budget = ("--target-size", "1.1MB", "--sensitivities", tmp_path / "fp8.json")
    refused = run(fp8, tmp_path / "out", *budget)
    assert refused.exit_code != 0 and "--from-quantized" in refused.output
    done = run(fp8, tmp_path / "out", *budget, "--from-quantized")
    assert done.exit_code == 0, done.output
    assert sum(path.stat().st_size for path in (tmp_path / "out").glob("*.safetensors")) <= 1_100_000
    with Checkpoint.open(tmp_path / "out") as out:
        assert not any(info.dtype is DType.F8_E4M3 for info in out.tensors.values())
    deep = ("--deep", fp8, "--max-memory", "8GiB")
    verified = CliRunner().invoke(app, list(map(str, ("verify", tmp_path / "out", *deep))))
    assert verified.exit_code == 0, verified.output


def test_nothing_is_measured_for_an_output_that_is_there_or_memory_that_is_not(source: Path, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    there = run(source, tmp_path / "out", "--bits", "6")
    assert there.exit_code == 5 and "exists already" in there.output
    small = run(source, tmp_path / "other", "--bits", "6", "--method", "gptq", "--jobs", "9999")
    assert small.exit_code == 4 and "--max-memory" in small.output
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (("--target-size", "1MB", "--bits", "5"), "two budgets"),
        (("--candidates", "int8"), "--candidates"),
        (("--sensitivity-tokens", "9"), "--sensitivity-tokens"),
        (("--bits", "0"), "--bits 0"),
        (("--bits", "nan"), "--bits nan"),
        (("--target-size", "20 pounds"), "not understood"),
        (("--bits", "5", "--scheme", "int8"), "--scheme"),
        (("--bits", "5", "--group", "32"), "--group"),
        (("--bits", "5", "--preset", "mixed"), "--preset"),
        (("--bits", "5", "--format", "gptq"), "--format"),
        (("--bits", "5", "--engine", "transformers"), "--engine transformers"),
        (("--bits", "5", "--candidates", "int3"), "int3"),
        (("--bits", "5", "--damping", "0.5"), "--damping"),
        (("--engine", "vllm"), "--engine"),
    ],
)
def test_options_that_do_not_go_together_are_refused(
    arguments: tuple[str, ...], says: str, source: Path, tmp_path: Path
) -> None:
    shown = run(source, tmp_path / "out", *arguments)
    assert shown.exit_code == 2
    assert says in shown.output
    assert not list(tmp_path.iterdir())


def test_an_impossible_budget_says_what_is_possible(source: Path, tmp_path: Path) -> None:
    shown = run(source, tmp_path / "out", "--target-size", "1KiB", *measured(source))
    assert shown.exit_code == 4
    assert "1,024 bytes are impossible" in shown.output and "ask for as many" in shown.output
    assert not list(tmp_path.iterdir())
