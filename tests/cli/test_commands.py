"""Whole commands as a user types them: output for people, JSON for machines, exit codes, nothing left behind."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner, Result

from qconvert.cli.app import app
from qconvert.cli.commands import MODULES
from tests.checkpoints import make_tiny


def run(*arguments: str | Path) -> Result:
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("source") / "src"
    make_tiny(path, shards=2)
    return path


@pytest.fixture(scope="module")
def converted(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("converted") / "int8"
    assert run("quantize", source, out, "--scheme", "int8", "--max-memory", "8GiB", "--json").exit_code == 0
    return out


def test_inspect_counts_and_sizes(source: Path) -> None:
    shown = run("inspect", source)
    assert shown.exit_code == 0
    assert "text expert" in shown.stdout
    document = json.loads(run("inspect", source, "--json").stdout)
    stored = sum(t.nbytes for file in source.glob("*.safetensors") for t in load_file(file).values())
    assert document["bytes"] == stored == sum(line["nbytes"] for line in document["roles"])
    sizes = document["schemes"]
    assert sizes["int4 --group 32"]["bytes"] < sizes["int8"]["bytes"] < stored
    assert "128" in sizes["int4 --group 128"]["impossible"]


def test_inspect_reads_what_quantize_wrote(converted: Path) -> None:
    assert "int8-channel-sym" in run("inspect", converted).stdout
    document = json.loads(run("inspect", converted, "--json").stdout)
    assert document["problems"] == []
    assert {line["scheme"] for line in document["roles"] if line["path"] == "text.expert.up"} == {"int8-channel-sym"}


def test_the_size_that_inspect_announces_is_the_size_that_quantize_writes(source: Path, converted: Path) -> None:
    announced = json.loads(run("inspect", source, "--json").stdout)["schemes"]["int8"]["bytes"]
    assert announced == sum(t.nbytes for file in converted.glob("*.safetensors") for t in load_file(file).values())


def test_a_dry_run_writes_nothing_and_names_every_tensor(source: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    shown = run("quantize", source, out, "--group", "32", "--dry-run")
    assert shown.exit_code == 0
    assert "int4-g32-sym" in shown.stdout
    plan = json.loads(run("quantize", source, out, "--group", "32", "--dry-run", "--json").stdout)
    read = {part["tensor"] for step in plan["steps"] for part in step["inputs"]}
    assert read == {name for file in source.glob("*.safetensors") for name in load_file(file)}
    assert all(step["reason"] for step in plan["steps"])
    assert os.listdir(tmp_path) == []


def test_a_dry_run_shows_what_is_scaled(source: Path, tmp_path: Path) -> None:
    np.save(tmp_path / "ids.npy", np.arange(400).reshape(4, 100))
    asked = [
        "--group",
        "32",
        "--method",
        "awq",
        "--calibration-data",
        tmp_path / "ids.npy",
        "--calibration-tokens",
        "96",
    ]
    asked += ["--calibration-window", "24", "--dry-run", "--json"]
    plans = [
        json.loads(run("quantize", source, tmp_path / "out", *asked, "--awq-folds", folds).stdout)["steps"]
        for folds in ("none", "up-down,post-attention")
    ]
    changed = {
        step["role"].partition(" ")[0]: step["action"]
        for before, step in zip(*plans, strict=True)
        if step["action"] != before["action"]
    }
    kept = ("text.router", "text.shared_expert_gate", "text.post_attention_norm", "text.shared_expert.gate")
    assert changed == dict.fromkeys((*kept, "text.shared_expert.up"), "scale in BF16")
    assert any("post-attention scales its columns" in step["reason"] for step in plans[1])


def test_quantize_reports_and_parity_passes(source: Path, converted: Path, tmp_path: Path) -> None:
    result = run("parity", source, converted, "--tokens", "64", "--report", tmp_path / "report")
    assert result.exit_code == 0, result.output
    assert "verdict: pass" in result.stdout
    report = json.loads((tmp_path / "report" / "parity.json").read_text())
    assert report["verdict"] == "pass"
    assert report["causes"] == []
    assert (tmp_path / "report" / "parity.md").read_text().startswith("# Parity: pass")


def test_a_limit_that_is_exceeded_is_exit_code_1(source: Path, converted: Path) -> None:
    result = run("parity", source, converted, "--tokens", "64", "--max-kl-mean", "1e-12")
    assert result.exit_code == 1
    assert "fail kl_mean" in result.stdout


def test_limits_come_from_a_file_and_options_go_before_it(source: Path, converted: Path, tmp_path: Path) -> None:
    limits = tmp_path / "limits.toml"
    limits.write_text('[[limit]]\nmetric = "kl_mean"\nat_most = 1e-12\nreason = "as strict as can be"\n')
    result = run("parity", source, converted, "--tokens", "64", "--limits", limits)
    assert result.exit_code == 1
    assert "kl_mean of as served is" in result.stdout.splitlines()[-1]
    result = run("parity", source, converted, "--tokens", "64", "--limits", limits, "--max-kl-mean", "9", "--json")
    assert result.exit_code == 0
    judged = [one for one in json.loads(result.stdout)["metrics"] if one["limit"] is not None]
    assert [(one["limit"], one["reason"]) for one in judged] == [(9.0, "given on the command line")]
    limits.write_text("[[limit]]\nmetric = 'kl'\n")
    result = run("parity", source, converted, "--limits", limits)
    assert result.exit_code == 2
    assert "no 'reason'" in result.stderr
    # nothing is discovered
    assert run("parity", source, converted, "--weights-only", "--limits", "default").exit_code == 2


def test_reports_are_compared(source: Path, converted: Path, tmp_path: Path) -> None:
    for name, seed in (("old", "0"), ("new", "0"), ("other", "1")):
        done = run("parity", source, converted, "--tokens", "64", "--seed", seed, "--report", tmp_path / name)
        assert done.exit_code == 0, done.output
    old, new, other = (tmp_path / name / "parity.json" for name in ("old", "new", "other"))
    result = run("parity", "diff", old, new)
    assert result.exit_code == 0, result.output
    assert "no regression" in result.stdout
    assert run("parity", "diff", old, other).exit_code == 2
    worse = json.loads(new.read_text())
    for metric in worse["metrics"]:
        if metric["name"] == "kl_mean":
            metric.update(value=9.0, low=8.0, high=10.0)
    new.write_text(json.dumps(worse))
    result = run("parity", "diff", old, new)
    assert result.exit_code == 1
    assert "worse: kl_mean of as served" in result.stdout
    assert len(json.loads(run("parity", "diff", old, new, "--json").stdout)["regressions"]) == 2


def test_a_policy_decides(source: Path, tmp_path: Path) -> None:
    policy = tmp_path / "policy.toml"
    policy.write_text('[[rule]]\nmatch = "text.shared_expert.*"\nscheme = "int8"\nreason = "eight bits here"\n')
    result = run("quantize", source, tmp_path / "out", "--group", "32", "--policy", policy)
    assert result.exit_code == 0, result.output
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["quantization_config"]["format"] == "mixed-precision"
    record = json.loads((tmp_path / "out" / "manifest.json").read_text())
    assert "eight bits here" in {line["reason"] for line in record["decisions"]}


@pytest.mark.parametrize(
    ("arguments", "code", "said"),
    [
        (["--scheme", "int3"], 2, "int4, int8, w8a8, fp8, fp8-block, mxfp4"),
        (["--scheme", "int8", "--group", "32"], 2, "no groups"),
        (["--group", "48"], 2, "32, 64 or 128"),
        (["--scheme", "fp8", "--asymmetric"], 2, "symmetric"),
        (["--max-memory", "much"], 2, "4GiB"),
        (["--jobs", "0"], 2, "--jobs"),
        (["--hash", "md5"], 2, "xxh3-128 or sha256"),
        (["--device", "gpu"], 2, "cpu, cuda or"),
        (["--device", "cuda:"], 2, "cpu, cuda or"),
        (["--shceme", "int4"], 2, "No such option"),
        (["--policy", "missing.toml"], 2, "missing.toml"),
        (["--awq-folds", "none"], 2, "--awq-folds for awq"),
        (["--method", "gptq", "--awq-folds", "none"], 2, "--awq-folds is for --method awq"),
        (["--method", "awq", "--awq-folds", "up-down,sideways"], 2, "up-down, post-attention, input"),
        (["--group", "128"], 4, "128"),
        (["--scheme", "fp8-block"], 4, "128"),
        (["--group", "32", "--max-memory", "1MB"], 4, "--max-memory"),
    ],
)
def test_a_wrong_option_is_one_error(source: Path, tmp_path: Path, arguments: list[str], code: int, said: str) -> None:
    result = run("quantize", source, tmp_path / "out", *arguments)
    assert result.exit_code == code, result.output
    assert said in result.stderr
    assert "Traceback" not in result.output
    assert os.listdir(tmp_path) == []


def edit_config(folder: Path, change: Callable[[dict[str, Any]], object]) -> None:
    file = folder / "config.json"
    config = json.loads(file.read_text())
    change(config)
    file.write_text(json.dumps(config))


def truncate(folder: Path) -> None:
    file = next(folder.glob("*.safetensors"))
    os.truncate(file, file.stat().st_size - 10)


def drop_tensor(folder: Path) -> None:
    file = folder / "model-00001-of-00002.safetensors"
    weights = load_file(file)
    name = next(name for name in weights if name.endswith(("q_proj.weight", "out_proj.weight")))
    del weights[name]
    save_file(weights, file, {"format": "pt"})
    index = folder / "model.safetensors.index.json"
    document = json.loads(index.read_text())
    del document["weight_map"][name]
    index.write_text(json.dumps(document))


def name_outside(folder: Path) -> None:
    index = folder / "model.safetensors.index.json"
    document = json.loads(index.read_text())
    document["weight_map"]["lm_head.weight"] = "../x.safetensors"
    index.write_text(json.dumps(document))


DAMAGE: dict[str, tuple[Callable[[Path], object], str]] = {
    "dense": (lambda f: edit_config(f, lambda c: c.update(model_type="qwen3_5")), "qwen3_5"),
    "next": (lambda f: edit_config(f, lambda c: c.update(model_type="qwen3_next")), "qwen3_next"),
    "other": (lambda f: edit_config(f, lambda c: c.update(model_type="llama")), "llama"),
    "lying": (lambda f: edit_config(f, lambda c: c["text_config"].update(num_experts=7)), "misshapen"),
    "yarn trap": (
        lambda f: edit_config(f, lambda c: c["text_config"].update(rope_scaling={"type": "yarn"})),
        '"rope_type": "yarn"',
    ),
    "no config": (lambda f: (f / "config.json").unlink(), "config.json"),
    "not JSON": (lambda f: (f / "config.json").write_text("{"), "config.json"),
    "truncated": (truncate, ".safetensors"),
    "missing shard": (lambda f: (f / "model-00002-of-00002.safetensors").unlink(), "model-00002"),
    "outside": (name_outside, "../x"),
    "missing tensor": (drop_tensor, "missing: "),
    "empty": (lambda f: [p.unlink() for p in f.iterdir()], "no checkpoint"),
}


@pytest.mark.parametrize("damage", DAMAGE)
@pytest.mark.parametrize("command", ["inspect", "quantize"])
def test_a_damaged_source_is_one_error_that_names_it(source: Path, tmp_path: Path, damage: str, command: str) -> None:
    broken = tmp_path / "broken"
    shutil.copytree(source, broken)
    change, said = DAMAGE[damage]
    change(broken)
    arguments = [tmp_path / "out", "--group", "32"] if command == "quantize" else []
    result = run(command, broken, *arguments)
    assert result.exit_code == 3, result.output
    assert said in result.stderr
    assert result.stderr.count("error:") == 1
    assert "Traceback" not in result.output
    assert os.listdir(tmp_path) == ["broken"]


def test_an_existing_output_is_refused(source: Path, converted: Path) -> None:
    result = run("quantize", source, converted, "--scheme", "int8")
    assert result.exit_code == 5
    assert "exists" in result.stderr


def test_help_has_examples_and_exit_codes() -> None:
    assert "Exit codes" in run("--help").stdout
    for command in ("inspect", "quantize", "convert", "verify", "check", "parity", "demo"):
        assert f"qconvert {command}" in run(command, "--help").stdout


def test_names_that_look_like_markup_are_printed_as_they_are(source: Path, tmp_path: Path) -> None:
    for name in ("[old]", "o[/b]x"):
        result = run("quantize", source, tmp_path / name, "--group", "32")
        assert result.exit_code == 0, result.output
        assert name in result.stdout


def test_a_demo_never_removes_somebody_elses_conversion(source: Path, tmp_path: Path) -> None:
    assert run("quantize", source, tmp_path / "int4", "--group", "32").exit_code == 0
    before = sorted(os.listdir(tmp_path / "int4"))
    result = run("demo", "--out", tmp_path)
    assert result.exit_code == 5
    assert "no output of an earlier demo" in result.stderr
    assert sorted(os.listdir(tmp_path / "int4")) == before


def test_a_dry_run_says_what_the_real_run_would_refuse(source: Path, tmp_path: Path) -> None:
    arguments = ("quantize", source, tmp_path, "--group", "32", "--dry-run")
    assert run(*arguments).exit_code == 5
    assert run(*arguments[:2], tmp_path / "out", *arguments[3:], "--max-memory", "1MB").exit_code == 4


def test_what_stays_behind_is_said(source: Path, tmp_path: Path) -> None:
    copy = tmp_path / "src"
    shutil.copytree(source, copy)
    (copy / "modeling.py").write_text("")
    result = run("quantize", copy, tmp_path / "out", "--group", "32")
    assert "left out: modeling.py (code)" in result.stdout


def test_an_empty_quantization_config_is_none(source: Path, tmp_path: Path) -> None:
    copy = tmp_path / "src"
    shutil.copytree(source, copy)
    edit_config(copy, lambda config: config.update(quantization_config=None))
    assert "schemes" in json.loads(run("inspect", copy, "--json").stdout)


def test_the_paths_that_inspect_lists_are_those_that_rules_match(source: Path, tmp_path: Path) -> None:
    paths = json.loads(run("inspect", source, "--json").stdout)["policy_paths"]
    assert "text.expert.gate" in paths and "text.expert.gate_up" not in paths
    policy = tmp_path / "policy.toml"
    for path in ("text.expert.gate", "text.attention.query.output_gate", "vision.merger.norm.bias", "mtp.expert.up"):
        policy.write_text(f'[[rule]]\nmatch = "{path}"\nkeep = true\n')
        result = run("quantize", source, tmp_path / "out", "--policy", policy, "--dry-run")
        assert "decides no tensor" not in result.stderr, path


def test_a_polite_request_to_end_leaves_nothing(source: Path, tmp_path: Path) -> None:
    script = (
        "import os, signal, sys; from qconvert import rounding_by; from qconvert.cli.app import app\n"
        "original = rounding_by.run\n"
        "def run(*a, **k): os.kill(os.getpid(), signal.SIGTERM); return original(*a, **k)\n"
        "rounding_by.run = run; app(sys.argv[1:])"
    )
    arguments = ["quantize", str(source), str(tmp_path / "new" / "out"), "--group", "32"]
    ended = subprocess.run([sys.executable, "-c", script, *arguments], capture_output=True, text=True, check=False)
    assert ended.returncode == 130, ended.stderr
    assert "Interrupted" in ended.stderr
    assert os.listdir(tmp_path) == []


def test_what_needs_no_weights_does_not_wait_for_torch() -> None:
    script = (
        "import sys; from qconvert.cli.app import app\n"
        "app(['--version'], standalone_mode=False); sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", script], capture_output=True, check=False).returncode == 0


@pytest.mark.parametrize("name", MODULES)
def test_every_command_is_loaded_by_its_name_and_tells_of_itself(name: str) -> None:
    result = run(*name.split(), "--help")
    assert result.exit_code == 0, result.stderr
    assert f"qconvert {name} [OPTIONS]" in " ".join(result.stdout.split())


def test_a_wrong_fold_is_refused_before_a_budget_is_measured(source: Path, tmp_path: Path) -> None:
    wrong = ("--method", "awq", "--target-size", "1MB", "--awq-folds", "bogus")
    result = run("quantize", source, tmp_path / "out", *wrong)
    assert result.exit_code == 2
    assert "'bogus' is unknown" in result.stderr
    assert os.listdir(tmp_path) == []
