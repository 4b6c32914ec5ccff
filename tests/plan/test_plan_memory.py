"""A plan of a large checkpoint has some 92,000 matrices: what it holds of each decides what planning takes."""

from __future__ import annotations

import gc
import tracemalloc
from pathlib import Path

import pytest

from benchmarks.make_synthetic import make_holes
from qconvert.convert import plan_conversion
from qconvert.core.plan import Quantize
from qconvert.plan.policy import default_policy, scheme_named
from reference_model.config import ModelConfig
from tests.checkpoints import tiny_config

BYTES_A_MATRIX = 1450
"""Measured in int4: 1,300 stacked, 1,350 one by one: three names of a hundred bytes, three places, a role, a step."""


@pytest.mark.parametrize("per_expert", [False, True])
def test_matrices_of_one_shape_share_what_they_have_in_common(tmp_path: Path, per_expert: bool) -> None:
    config = tiny_config(experts=256, layers=4, mtp=False)
    make_holes(tmp_path / "src", ModelConfig.from_dict(config), config, per_expert=per_expert)
    policy = default_policy(scheme_named("int4", group=32))
    plan_conversion(tmp_path / "src", policy)  # what is made once is there
    tracemalloc.start()
    try:
        plan = plan_conversion(tmp_path / "src", policy)
        gc.collect()  # what nobody holds any more
        held = tracemalloc.get_traced_memory()[0]
    finally:
        tracemalloc.stop()
    rounded = [step for step in plan.steps if isinstance(step.action, Quantize)]
    assert len(rounded) == 4 * 3 * 256
    assert held / len(rounded) < BYTES_A_MATRIX
    shapes = {id(info.shape) for info in plan.layout.tensors if ".mlp.experts." in info.name}
    assert len(shapes) <= 6
