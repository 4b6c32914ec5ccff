"""Scaling up against down changes no output and is no fault; a scale of the wrong size still is one beside it."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from qconvert.convert import convert
from qconvert.core.scheme import int4
from qconvert.parity.causes import CauseKind
from qconvert.parity.tensors import compare_weights
from qconvert.plan.policy import default_policy
from qconvert.sequential.calibration import Calibration
from qconvert.weights.source import CheckpointWeights
from tests.checkpoints import make_tiny


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Experts whose units are of sizes over two orders of magnitude, so that scaling them pays."""
    folder = tmp_path_factory.mktemp("scaled") / "src"
    make_tiny(folder, mtp=False, vision=False, layout="per-expert", shards=1, layers=2)
    tensors = load_file(folder / "model.safetensors")
    for name in tensors:
        if "experts." in name and name.endswith("up_proj.weight"):
            tensors[name] = tensors[name] * torch.logspace(-1, 1, 64, dtype=torch.bfloat16)[:, None]
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    return folder


@pytest.fixture(scope="module")
def converted(source: Path) -> Path:
    ids = torch.randint(400, (8, 32), generator=torch.Generator().manual_seed(1))
    out = source.parent / "awq"
    convert(source, out, default_policy(int4(32)), calibration=Calibration(method="awq", batches=(ids,)))
    return out


def compared(source: Path, out: Path) -> tuple[int, list[tuple[CauseKind, str]], float]:
    with CheckpointWeights.open(source) as a, CheckpointWeights.open(out, strict=False) as b:
        found = compare_weights(a, b)
    quantized = [one.sums.sqnr_db for one in found.tensors if one.scheme is not None]
    return found.scaled, [(one.kind, str(one)) for one in found.causes], min(quantized)


def test_experts_that_awq_has_scaled_are_compared_as_they_work(source: Path, converted: Path) -> None:
    scaled, causes, worst = compared(source, converted)
    assert 8 <= scaled <= 2 * 6  # some are best as they are
    assert causes == []
    assert worst > 12.0


def test_nothing_else_is_taken_for_it(source: Path, tmp_path: Path) -> None:
    convert(source, tmp_path / "rtn", default_policy(int4(32)))
    assert compared(source, tmp_path / "rtn")[:2] == (0, [])


@pytest.mark.parametrize("part", ["up_proj", "down_proj"])
def test_a_doubled_scale_is_named_beside_it(source: Path, converted: Path, tmp_path: Path, part: str) -> None:
    for file in converted.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    tensors = load_file(tmp_path / "model.safetensors")
    tensors[f"model.language_model.layers.1.mlp.experts.3.{part}.weight_scale"] *= 2
    save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
    scaled, causes, _ = compared(source, tmp_path)
    assert scaled == compared(source, converted)[0] - 1
    assert causes[0][0] is CauseKind.SCALE_FACTOR
    assert "layer 1 expert 3" in causes[0][1]
