"""Contexts beyond the native one: YaRN and positions of a million turn heads as in the reference."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from qconvert.onnx_export.operator_sets import OPERATOR_SETS
from tests.checkpoints import make_tiny
from tests.onnx_export.packages import EXACT, error, exported, prompt, reference
from tests.tolerances import tolerances

LIMIT = tolerances("onnx_export")["fp32_logits"]

YARN: dict[str, Any] = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 1024}
"""At 262,144 as at 1,024: what YaRN stretches are planes that turn seldom within the original context."""


def made(folder: Path, **rope: Any) -> Path:
    make_tiny(folder, layers=3, vision=False, mtp=False)
    path = folder / "config.json"
    config = json.loads(path.read_text())
    config["text_config"]["rope_parameters"] |= rope
    config["text_config"]["max_position_embeddings"] = 1_048_576
    path.write_text(json.dumps(config))
    return folder


@pytest.mark.parametrize("ops", [one.name for one in OPERATOR_SETS])
@pytest.mark.parametrize("rope", [{}, YARN], ids=["plain", "yarn"])
@pytest.mark.parametrize("start", [0, 300_000, 1_000_000])
def test_far_positions_give_the_references_logits(ops: str, rope: dict[str, Any], start: int, tmp_path: Path) -> None:
    source = made(tmp_path / "source", **rope)
    model = reference(source)
    package = exported(source, tmp_path / "package", replace(EXACT, ops=ops))
    ids, _ = prompt(model, 2, 40)
    positions = np.broadcast_to(np.arange(40) + start, (3, 2, 40)).astype(np.int64)
    with torch.no_grad():
        expected = model(torch.from_numpy(ids), position_ids=torch.from_numpy(positions)).logits.numpy()
    first = package.forward(ids[:, :30], position_ids=positions[:, :, :30])
    assert int(first.cache.next_position[0]) == start + 30
    second = package.forward(ids[:, 30:], cache=first.cache)  # positions count on from the cache
    assert error(np.concatenate((first.logits, second.logits), axis=1), expected) < LIMIT
    config = json.loads((tmp_path / "package" / "genai_config.json").read_text())
    assert config["model"]["context_length"] == 1_048_576


def test_yarn_is_another_rotation(tmp_path: Path) -> None:
    """Otherwise the test above would compare plain rotations."""
    plain, stretched = (reference(made(tmp_path / str(len(rope)), **rope)) for rope in ({}, YARN))
    ids, near = prompt(plain, 1, 40)
    with torch.no_grad():
        assert error(stretched(torch.from_numpy(ids)).logits.numpy(), near) > 100 * LIMIT
