"""Rounding by statistics: scales under what inputs count, said of every matrix, repeated to the same bytes."""

from __future__ import annotations

import json
import shutil
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from typer.testing import CliRunner

from calibration.capture import capture
from calibration.data import calibration_windows
from calibration.statistics import Statistics
from qconvert import memory
from qconvert.cli.app import app
from qconvert.convert import convert, plan_conversion
from qconvert.core.by_statistics import IMATRIX, ByStatistics
from qconvert.core.errors import OutputError, PlanError, UsageError
from qconvert.core.plan import Quantize
from qconvert.core.role import Kind, Section
from qconvert.core.scheme import NVFP4, int4
from qconvert.io.checkpoint import Checkpoint
from qconvert.manifest_reader import read_manifest
from qconvert.numerics.importance import quantize_by_importance
from qconvert.plan.policy import Policy, Rule, default_policy
from qconvert.texts.documents import Text
from qconvert.verify import verify
from qconvert.weights.source import CheckpointWeights
from tests.checkpoints import make_tiny
from tests.test_convert import digest

EVERYTHING = (
    Rule(match="vision.block.*", scheme=None, reason="kept", default=True),
    Rule(match="mtp.expert.*", scheme=int4(32), reason="mtp", search=True),
    Rule(match="text.shared_expert.*", scheme=int4(32), reason="shared", search=True),
    Rule(match="text.linear_attention.output", scheme=int4(32), reason="not searched"),
)
POLICY = default_policy(int4(32), search=True, rules=EVERYTHING)


@pytest.fixture(autouse=True)
def a_process_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    """What other tests left in memory does not count."""
    monkeypatch.setattr(memory, "resident_bytes", lambda: 300 << 20)


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("imatrix") / "src"
    make_tiny(folder, experts=24)
    return folder


def made(source: Path, out: Path, tokens: int = 60) -> Path:
    np.save(source.parent / "ids.npy", np.random.default_rng(0).integers(0, 400, 200))
    texts = [Text.parse(str(source.parent / "ids.npy"))]
    windows = calibration_windows(source, 416, texts=texts, tokens=tokens, window=12, seed=0)
    capture(source, out, windows, memory=64 << 20)
    return out


@pytest.fixture(scope="module")
def stats(source: Path) -> Path:
    return made(source, source.parent / "stats")


@pytest.fixture
def by(source: Path, stats: Path) -> Iterator[ByStatistics]:
    with Checkpoint.open(source) as checkpoint, Statistics.open(stats, checkpoint) as found:
        yield ByStatistics(method=IMATRIX, statistics=found)


@pytest.fixture(scope="module")
def out(source: Path, stats: Path) -> Path:
    with Statistics.open(stats) as found:
        by = ByStatistics(method=IMATRIX, statistics=found)
        convert(source, source.parent / "out", POLICY, calibration=by)
    return source.parent / "out"


def test_every_matrix_is_what_weighted_rounding_makes_of_it(source: Path, stats: Path, out: Path) -> None:
    kinds: Counter[Kind] = Counter()
    with (
        CheckpointWeights.open(source) as before,
        CheckpointWeights.open(out) as after,
        Statistics.open(stats) as found,
    ):
        for role in after.stored:
            scheme = after.scheme(role)
            if scheme is None or role.kind is Kind.LINEAR_OUTPUT:
                continue
            expected = quantize_by_importance(before.matrix(role), scheme, found.importance(role)).quantized
            assert torch.equal(after.quantized(role).codes, expected.codes), role
            kinds[role.kind] += found.tokens(role) > 0
    assert kinds.keys() == {
        Kind.EXPERT_GATE, Kind.EXPERT_UP, Kind.EXPERT_DOWN, Kind.SHARED_GATE, Kind.SHARED_UP, Kind.SHARED_DOWN
    }  # fmt: skip
    assert all(kinds.values())


def test_the_weights_matter(source: Path, out: Path, tmp_path: Path) -> None:
    convert(source, tmp_path / "plain", POLICY)
    assert digest(tmp_path / "plain") != digest(out)


def test_the_plan_says_of_every_matrix_why(source: Path, by: ByStatistics) -> None:
    plan = plan_conversion(source, POLICY, calibration=by)
    told: dict[str, set[Kind]] = {}
    for step in plan.steps:
        if isinstance(step.action, Quantize):
            told.setdefault(step.action.reason.partition("; ")[2], set()).add(step.role.kind)
            assert (step.action.method == IMATRIX) == ("mean squares" in step.action.reason)
    assert told.keys() == {
        "scales by the mean squares of its inputs",
        "no token reached it: scales by the mean squares of its layer's inputs",
        "no token reached it: scales by squared error alone",
        "its scales are not searched",
    }
    assert told["no token reached it: scales by the mean squares of its layer's inputs"] == {
        Kind.EXPERT_GATE, Kind.EXPERT_UP
    }  # fmt: skip
    assert told["no token reached it: scales by squared error alone"] == {Kind.EXPERT_DOWN}
    assert told["its scales are not searched"] == {Kind.LINEAR_OUTPUT}


def test_a_matrix_that_was_not_looked_at_has_a_reason_of_its_own(source: Path, by: ByStatistics) -> None:
    class Without:
        """The same statistics, made of a checkpoint whose head was left out."""

        hash, entry = by.statistics.hash, by.statistics.entry
        tokens, importance = by.statistics.tokens, by.statistics.importance

        def has(self, role: object) -> bool:
            return getattr(role, "section", None) is not Section.MTP and by.statistics.has(role)  # type: ignore[arg-type]

    plan = plan_conversion(source, POLICY, calibration=replace(by, statistics=Without()))
    said = {
        step.action.reason
        for step in plan.steps
        if isinstance(step.action, Quantize) and step.role.section is Section.MTP
    }
    assert said == {"mtp; its inputs were not looked at: scales by squared error alone"}


def test_the_manifest_names_the_statistics(out: Path, by: ByStatistics) -> None:
    noted = read_manifest(out).calibration
    assert noted is not None
    assert noted["method"] == IMATRIX
    assert noted["statistics"]["hash"] == by.statistics.hash
    assert noted["statistics"]["folder"] == "stats"
    assert noted["statistics"]["tokens"] == 60
    assert set(noted) == {"method", "statistics"}


def test_it_verifies_deeply_with_its_statistics_and_with_no_others(
    source: Path, out: Path, by: ByStatistics, tmp_path: Path
) -> None:
    assert verify(out, source, by=by).faults == ()
    assert verify(out).faults == ()
    with pytest.raises(UsageError, match=r"was rounded by imatrix and statistics .* give them with --stats"):
        verify(out, source)
    with (
        Statistics.open(made(source, tmp_path / "other", tokens=36)) as other,
        pytest.raises(UsageError, match="those in --stats have"),
    ):
        verify(out, source, by=replace(by, statistics=other))
    convert(source, tmp_path / "plain", POLICY)
    with pytest.raises(UsageError, match="was not rounded by statistics: drop --stats"):
        verify(tmp_path / "plain", source, by=by)


def test_a_changed_code_shows(source: Path, out: Path, by: ByStatistics, tmp_path: Path) -> None:
    shutil.copytree(out, tmp_path / "out")
    convert(source, tmp_path / "plain", POLICY)
    for path in (tmp_path / "out").glob("*.safetensors"):
        path.write_bytes((tmp_path / "plain" / path.name).read_bytes())
    faults = verify(tmp_path / "out", source, by=by).faults
    assert any("experts" in (fault.tensor or "") for fault in faults)


def test_a_run_goes_on_with_the_same_statistics_only(
    source: Path, out: Path, by: ByStatistics, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(done: int, total: int) -> None:
        if done > total // 2:
            raise OutputError("disk full")

    monkeypatch.setattr("qconvert.io.committer.GROUP_BYTES", 1 << 12)
    with pytest.raises(OutputError, match="disk full"):
        convert(source, tmp_path / "out", POLICY, calibration=by, progress=full)
    with pytest.raises(OutputError, match=r"calibration"):
        convert(source, tmp_path / "out", POLICY)
    convert(source, tmp_path / "out", POLICY, calibration=by)
    assert digest(tmp_path / "out") == digest(out)


@pytest.mark.parametrize("jobs", [1, 3])
def test_the_bytes_do_not_depend_on_jobs(jobs: int, source: Path, out: Path, by: ByStatistics, tmp_path: Path) -> None:
    convert(source, tmp_path / "out", POLICY, calibration=by, jobs=jobs)
    assert digest(tmp_path / "out") == digest(out)


def test_a_folded_shared_expert_has_the_codes_of_the_unfolded_one(
    source: Path, stats: Path, by: ByStatistics, tmp_path: Path
) -> None:
    policy = default_policy(
        int4(32), search=True, rules=(Rule(match="*.shared_expert.*", scheme=int4(32), reason="alike", search=True),)
    )
    rules = (Rule(match="mtp.*", scheme=None, reason="kept"), *policy.rules)
    convert(source, tmp_path / "folded", Policy(rules=rules), calibration=by, fold=True)
    convert(source, tmp_path / "flat", Policy(rules=rules), calibration=by)
    names = "model.language_model.layers.0.mlp"
    flat = {name: t for path in (tmp_path / "flat").glob("*.safetensors") for name, t in load_file(path).items()}
    folded = {name: t for path in (tmp_path / "folded").glob("*.safetensors") for name, t in load_file(path).items()}
    for part in ("gate_proj", "up_proj"):
        whole = flat[f"{names}.shared_expert.{part}.weight_packed"]
        assert torch.equal(folded[f"{names}.experts.24.{part}.weight_packed"][: len(whole)], whole)
    assert verify(tmp_path / "folded", source, by=by).faults == ()


def test_schemes_with_a_second_scale_are_weighted_too(tmp_path: Path) -> None:
    make_tiny(tmp_path / "src", group=128)
    with Statistics.open(made(tmp_path / "src", tmp_path / "stats")) as found:
        by = ByStatistics(method=IMATRIX, statistics=found)
        convert(tmp_path / "src", tmp_path / "out", default_policy(NVFP4, search=True), calibration=by)
        assert verify(tmp_path / "out", tmp_path / "src", by=by).faults == ()


def test_statistics_of_matrices_with_other_inputs_are_refused(source: Path, by: ByStatistics) -> None:
    class Narrow:
        hash, entry = by.statistics.hash, by.statistics.entry
        has, tokens = by.statistics.has, by.statistics.tokens

        def importance(self, role: object) -> torch.Tensor:
            return torch.ones(5)

    with pytest.raises(PlanError, match=r"down_proj.* has 64 inputs, the statistics tell of 5: calibrate again"):
        plan_conversion(source, POLICY, calibration=replace(by, statistics=Narrow()))


def run(*arguments: object) -> tuple[int, str]:
    result = CliRunner().invoke(app, [str(one) for one in arguments])
    return result.exit_code, result.output


def test_the_commands_from_text_to_a_verified_checkpoint(source: Path, tmp_path: Path) -> None:
    text = f"ids={source.parent / 'ids.npy'}"
    code, told = run("calibrate", source, "-o", tmp_path / "stats", "--text", text, "--tokens", 48, "--window", 12)
    assert code == 0, told
    assert "48 tokens in windows of 12: ids 48" in told
    assert "experts got no token" in told and "Give more text with --text" in told
    assert (tmp_path / "stats" / "coverage.svg").read_text().startswith("<svg")
    asked = ["--scheme", "int4", "--group", "32", "--method", "imatrix", "--stats", tmp_path / "stats"]
    code, told = run("quantize", source, tmp_path / "out", *asked, "--dry-run")
    assert code == 0, told
    assert "scales by the mean squares of its" in " ".join(told.split())
    code, told = run("quantize", source, tmp_path / "out", *asked, "--json")
    assert code == 0, told
    document = json.loads(told)
    assert document["calibration"]["statistics"]["folder"] == "stats"
    assert any("got no token" in warning for warning in document["warnings"])
    code, told = run("verify", tmp_path / "out", "--deep", source, "--stats", tmp_path / "stats")
    assert (code, "no fault" in told) == (0, True), told
    code, told = run("verify", tmp_path / "out", "--deep", source)
    assert (code, "give them with --stats" in " ".join(told.split())) == (2, True), told


def test_calibrate_as_json_is_one_document(source: Path, tmp_path: Path) -> None:
    text = f"ids={source.parent / 'ids.npy'}"
    asked = ["--text", text, "--tokens", 4800, "--window", 12, "--json"]
    code, told = run("calibrate", source, "-o", tmp_path / "stats", *asked)
    assert code == 0, told
    document = json.loads(told)
    assert document["windows"]["domains"] == {"ids": {"tokens": 192, "of": 192}}
    assert [layer["layer"] for layer in document["coverage"]] == ["layers.0", "layers.1", "layers.2", "mtp.layers.0"]
    assert document["warnings"][0].startswith("the texts hold 192 tokens in whole windows, 4,800 were asked for")


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--method", "magic"], "expected one of rtn, "),
        (["--method", "imatrix"], "needs --stats STATS"),
        (["--stats", "x"], "--stats is for --method imatrix"),
        (["--method", "imatrix", "--stats", "nowhere"], "no statistics.json in it"),
        (["--method", "imatrix", "--stats", "x", "--scheme", "nf4"], "drop the search"),
    ],
)
def test_options_that_do_not_go_together_are_one_error(arguments: list[str], says: str, source: Path) -> None:
    code, told = run("quantize", source, source.parent / "never", *arguments)
    assert code in (2, 3)
    assert says in " ".join(told.split())
    assert not (source.parent / "never").exists()


def test_statistics_are_never_written_over(source: Path, tmp_path: Path) -> None:
    (tmp_path / "stats").mkdir()
    code, told = run("calibrate", source, "-o", tmp_path / "stats", "--text", f"ids={source.parent / 'ids.npy'}",
                     "--tokens", 48, "--window", 12)  # fmt: skip
    assert (code, "exists already" in told) == (5, True), told
