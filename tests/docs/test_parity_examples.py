"""The examples of docs/parity.md and action.yml, run as they stand there on the demo checkpoint."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from qconvert.cli.demo import CHECKPOINT
from qconvert.convert import convert
from qconvert.core.scheme import int4
from qconvert.parity.limits import read_limits
from qconvert.parity.outputs.document import as_document
from qconvert.plan.policy import default_policy
from tests.parity.outputs.reports import full_report

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "parity.md").read_text(encoding="utf-8")
ACTION: dict[str, Any] = yaml.safe_load((ROOT / "action.yml").read_text(encoding="utf-8"))

pytest_plugins = ["pytester"]


def block(language: str, containing: str = "") -> str:
    found = [text for text in re.findall(rf"```{language}\n(.*?)```", PAGE, re.DOTALL) if containing in text]
    assert len(found) == 1, (language, containing)
    return str(found[0])


def fewer(text: str) -> str:
    """The same with fewer tokens: what they cost is not what is tested."""
    assert "2048" in text
    return text.replace("2048", "256")


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with ``original`` and ``converted``, as the examples call them."""
    folder = tmp_path_factory.mktemp("models")
    (folder / "original").symlink_to(CHECKPOINT)
    convert(CHECKPOINT, folder / "converted", default_policy(int4(128)), jobs=1, max_memory=8 << 30)
    return folder


@pytest.fixture
def place(models: Path, tmp_path: Path) -> Path:
    for name in ("original", "converted"):
        (tmp_path / name).symlink_to(models / name)
    return tmp_path


def shell(script: str, place: Path, **variables: str) -> subprocess.CompletedProcess[str]:
    """Run as GitHub runs a step with ``shell: bash``, with ``qconvert`` from this environment."""
    (place / "script.sh").write_text(script, encoding="utf-8")
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    return subprocess.run(
        ["bash", "--noprofile", "--norc", "-eo", "pipefail", "script.sh"],
        cwd=place,
        env={**os.environ, "PYTHONPATH": str(ROOT), "PATH": path, **variables},
        capture_output=True,
        text=True,
        timeout=300,
    )


def test_the_shell_example_passes(place: Path) -> None:
    done = shell(fewer(block("bash")), place)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "verdict: pass" in done.stdout
    assert (place / "parity-report" / "junit.xml").is_file()


COMMAND = """#!/bin/bash
echo "$@" >> calls
if [[ $2 == diff ]]; then echo "worse: kl_mean"; exit "$DIFF"; fi
mkdir -p "${2#--report=}"
echo "# Parity" > "${2#--report=}/parity.md"
exit "$CODE"
"""
"""Instead of ``qconvert``: says what it was called with, and ends as it is told."""


@pytest.fixture
def ends(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[int, int], None]:
    """Let ``qconvert parity`` and ``qconvert parity diff`` end with these codes."""
    command = tmp_path / "bin" / "qconvert"
    command.parent.mkdir()
    command.write_text(COMMAND, encoding="utf-8")
    command.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(command))

    def choose(code: int, diff: int) -> None:
        monkeypatch.setenv("CODE", str(code))
        monkeypatch.setenv("DIFF", str(diff))

    return choose


@pytest.mark.parametrize(("code", "diff", "said"), [(0, 0, 0), (0, 1, 1), (1, 0, 1), (7, 0, 7), (7, 1, 1), (3, 2, 1)])
def test_the_shell_example_ends_as_the_commands_do(
    code: int, diff: int, said: int, ends: Callable[[int, int], None], tmp_path: Path
) -> None:
    ends(code, diff)
    assert shell(block("bash"), tmp_path).returncode == code
    (tmp_path / "baseline").mkdir()
    (tmp_path / "baseline" / "parity.json").touch()
    assert shell(block("bash"), tmp_path).returncode == said
    calls = (tmp_path / "calls").read_text(encoding="utf-8").splitlines()
    assert calls[-1] == "parity diff baseline/parity.json parity-report/parity.json"


def test_the_gitlab_example_runs_the_shell_example_and_shows_its_junit_file() -> None:
    job = yaml.safe_load(block("yaml", "artifacts:"))["parity"]
    assert job["script"] == ["bash parity.sh"] and "saved as `parity.sh`" in PAGE
    folder = re.search(r"--report (\S+)", block("bash"))
    assert folder is not None
    assert job["artifacts"]["paths"] == [folder[1]]
    assert job["artifacts"]["reports"]["junit"] == f"{folder[1]}/junit.xml"


def example_inputs() -> dict[str, str]:
    """What the example on the page gives the action."""
    steps = yaml.safe_load(block("yaml", "runs-on"))["jobs"]["parity"]["steps"]
    (inputs,) = [step["with"] for step in steps if step["uses"] == "./"]
    return dict(inputs)


def run_action(place: Path, inputs: dict[str, str]) -> tuple[subprocess.CompletedProcess[str], str, dict[str, str]]:
    """Run the action's steps but for the installation: what it says, its summary and its outputs."""
    assert set(inputs) <= set(ACTION["inputs"])
    assert {name for name, one in ACTION["inputs"].items() if one.get("required")} <= set(inputs)
    values = {name: inputs.get(name, one.get("default", "")) for name, one in ACTION["inputs"].items()}
    files = {name: place / name.lower() for name in ("GITHUB_STEP_SUMMARY", "GITHUB_OUTPUT")}
    for file in files.values():
        file.write_text("of=before\n", encoding="utf-8")
    (step,) = [one for one in ACTION["runs"]["steps"] if one.get("if") != "inputs.install == 'true'"]
    variables = {
        name: re.sub(r"\$\{\{ inputs\.([\w-]+) \}\}", lambda found: values[found[1]], text)
        for name, text in step["env"].items()
    }
    done = shell(step["run"], place, **variables, **{name: str(path) for name, path in files.items()})
    texts = {name: path.read_text(encoding="utf-8") for name, path in files.items()}
    assert all(text.startswith("of=before\n") for text in texts.values())  # what other steps have said is kept
    summary, outputs = (text.removeprefix("of=before\n") for text in texts.values())
    return done, summary, dict(line.split("=", 1) for line in outputs.splitlines())


def test_the_action_posts_the_report(place: Path) -> None:
    inputs = {**example_inputs(), "tokens": fewer(example_inputs()["tokens"])}
    assert inputs.pop("baseline") == "baseline/parity.json"
    done, summary, outputs = run_action(place, inputs)
    assert done.returncode == 0, done.stdout + done.stderr
    assert summary == (place / "parity-report" / "parity.md").read_text(encoding="utf-8")
    assert outputs == {"verdict": "pass", "report": "parity-report"}


@pytest.mark.parametrize(
    ("code", "diff", "ambiguous", "verdict", "said"),
    [
        (0, 0, "false", "pass", 0),
        (1, 0, "false", "fail", 1),
        (7, 0, "false", "ambiguous", 7),
        (7, 0, "true", "ambiguous", 0),
        (3, 0, "true", "error", 3),
        (0, 1, "false", "pass", 1),
        (1, 2, "false", "fail", 1),
    ],
)
def test_the_action_ends_as_the_commands_do(
    code: int, diff: int, ambiguous: str, verdict: str, said: int, ends: Callable[[int, int], None], tmp_path: Path
) -> None:
    ends(code, diff)
    inputs = {
        "original": '$(touch hacked) "; touch hacked; "', "converted": "-x", "allow-ambiguous": ambiguous,
        "report": "a folder", "baseline": "old.json",
    }  # fmt: skip
    done, summary, outputs = run_action(tmp_path, inputs)
    assert done.returncode == said, done.stderr
    assert outputs == {"verdict": verdict, "report": "a folder"}
    assert not (tmp_path / "hacked").exists()
    calls = (tmp_path / "calls").read_text(encoding="utf-8").splitlines()
    assert calls[0] == f"parity --report=a folder --limits=default -- {inputs['original']} -x"
    if verdict == "error":
        assert len(calls) == 1 and summary == ""
    else:
        assert calls[1] == "parity diff -- old.json a folder/parity.json"
        assert summary == "# Parity\n## Since the baseline\n    worse: kl_mean\n"


def test_every_input_of_the_action_is_explained_and_used() -> None:
    text = (ROOT / "action.yml").read_text(encoding="utf-8")
    for name, one in ACTION["inputs"].items():
        assert one["description"].endswith("."), name
        assert f"inputs.{name}" in text
    # text that is put into a script could end it: expressions stand in variables and outputs alone
    assert not any("${{" in step["run"] for step in ACTION["runs"]["steps"])
    assert all(step["shell"] == "bash" for step in ACTION["runs"]["steps"])


def test_the_limits_on_the_page_are_read(tmp_path: Path) -> None:
    (tmp_path / "parity.toml").write_text(block("toml"), encoding="utf-8")
    assert [one.metric for one in read_limits(tmp_path / "parity.toml")] == ["kl_mean", "router_overlap"]


def test_the_page_names_every_key_of_a_report() -> None:
    told = set(re.findall(r"`(\w+)`", PAGE))
    document = as_document(full_report())
    assert set(document) | set(document["metrics"][0]) <= told


def test_the_example_for_test_suites_passes(
    place: Path, pytester: pytest.Pytester, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytester.makepyfile(fewer(block("python")))
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    for name in ("original", "converted"):
        (pytester.path / name).symlink_to(place / name)
    pytester.runpytest_inprocess("-p", "qconvert.pytest_plugin").assert_outcomes(passed=1)
