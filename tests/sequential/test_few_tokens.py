"""Experts that few tokens reach, or none, are rounded by what their layer reads; codes are finite for any text."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from qconvert.cli.calibrated import coverage_of, coverage_warnings
from qconvert.convert import convert
from qconvert.core.errors import PlanError, UsageError
from qconvert.core.scheme import NVFP4, bnb4, int4
from qconvert.manifest import CALIBRATION, EXPERT_COVERAGE, LOSS_OVER_NEAREST
from qconvert.plan.policy import default_policy
from qconvert.sequential.calibration import Calibration, Method
from qconvert.weights.source import CheckpointWeights
from tests.checkpoints import make_tiny


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("few") / "src"
    make_tiny(folder, experts=24, layers=2)
    return folder


@pytest.mark.parametrize("method", ["gptq", "awq"])
@pytest.mark.parametrize("ids", [[[7, 7, 7, 7]], [[1, 2]], [[3, 5, 8, 13, 21, 34, 55, 89]]], ids=["one", "two", "few"])
def test_every_code_is_finite_and_the_text_is_said_to_be_short(
    source: Path, tmp_path: Path, method: Method, ids: list[list[int]]
) -> None:
    calibration = Calibration(method=method, batches=(torch.tensor(ids),))
    done = convert(source, tmp_path / "out", default_policy(int4(32)), calibration=calibration)
    coverage = done.record[CALIBRATION][EXPERT_COVERAGE]
    assert coverage["matrices"] == 2 * 24 * 3
    assert coverage["no_token"] > 0
    assert coverage["fewest_tokens"] == 0
    found = coverage_of(done.record[CALIBRATION])
    assert found is not None and found.experts == 2 * 24 and found.tokens == len(ids[0])
    assert [layer.name for layer in found.layers] == ["layers.0", "layers.1"]
    assert 3 * found.unreached == coverage["no_token"] and found.fewer_than_inputs == 2 * 24
    warnings = list(coverage_warnings(done.record[CALIBRATION]))
    assert any("no token reached" in warning and "--calibration-data" in warning for warning in warnings)
    convert(source, tmp_path / "rtn", default_policy(int4(32), search=True))
    other = []
    with CheckpointWeights.open(tmp_path / "out") as out, CheckpointWeights.open(tmp_path / "rtn") as nearest:
        for role in out.stored:
            if out.scheme(role) is not None:
                assert bool(out.matrix(role).isfinite().all())
                other.append(float((out.quantized(role).codes != nearest.quantized(role).codes).float().mean()))
    assert min(other) > 0.001  # none of them is silently rounded to nearest


def test_the_error_of_outputs_is_below_that_of_rounding_to_nearest(source: Path, tmp_path: Path) -> None:
    ids = torch.randint(400, (8, 32), generator=torch.Generator().manual_seed(0))
    for method in ("gptq", "awq"):
        done = convert(
            source, tmp_path / method, default_policy(int4(32)), calibration=Calibration(method=method, batches=(ids,))
        )
        losses = done.record[CALIBRATION][LOSS_OVER_NEAREST]
        assert losses["text.expert.down"] < (0.8 if method == "gptq" else 1.0)
        assert method == "awq" or losses["text.expert.gate"] < 0.8


def test_what_cannot_be_calibrated_is_refused_before_anything_is_written(source: Path, tmp_path: Path) -> None:
    ids = torch.zeros(1, 4, dtype=torch.int64)
    gptq, awq = (Calibration(method=method, batches=(ids,)) for method in ("gptq", "awq"))
    with pytest.raises(PlanError, match="--method rtn"):
        convert(source, tmp_path / "out", default_policy(bnb4("nf4")), calibration=gptq)
    with pytest.raises(PlanError, match=r"search = true.*drop the search"):
        convert(source, tmp_path / "out", default_policy(int4(32), search=True), calibration=gptq)
    with pytest.raises(PlanError, match="--method gptq does"):
        convert(source, tmp_path / "out", default_policy(NVFP4), calibration=awq)
    with pytest.raises(UsageError, match="vocabulary"):
        convert(source, tmp_path / "out", default_policy(int4(32)), calibration=replace(gptq, batches=(ids + 416,)))
    with pytest.raises(UsageError, match="two tokens"):
        Calibration(method="gptq", batches=(ids[:, :1],))
    with pytest.raises(UsageError, match="damping"):
        Calibration(method="gptq", batches=(ids,), damping=0.0)
    assert list(tmp_path.iterdir()) == []
