"""What engines read, though it looks odd, raises nothing."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from qconvert.convert import convert
from qconvert.core.scheme import int4
from qconvert.engine_check.rule import Engine
from qconvert.engine_check.run import check_checkpoint
from qconvert.plan.policy import default_policy
from tests.checkpoints import make_tiny
from tests.edits import edit_tensors


@pytest.fixture
def source(tmp_path: Path) -> Path:
    make_tiny(tmp_path / "src", group=128)  # experts are 128 wide
    return tmp_path / "src"


def faults(path: Path, *engines: Engine, tp: int = 1) -> set[str]:
    return {one.rule.id for one in check_checkpoint(path, engines or tuple(Engine), tp=tp).faults}


@pytest.mark.parametrize("method", ["gptq", "awq", "compressed-tensors"])
def test_groups_of_gptq_and_awq_experts_are_halved_where_ranks_split_them(
    source: Path, tmp_path: Path, method: str
) -> None:
    convert(source, tmp_path / "out", default_policy(int4(128)).stored_as(method))
    found = faults(tmp_path / "out", Engine.VLLM, tp=2)
    assert ("vllm-expert-groups" in found) == (method == "compressed-tensors")
    assert "vllm-expert-groups" in faults(tmp_path / "out", Engine.VLLM, tp=8)  # 16 of them are too few for any


def test_scales_of_cached_keys_and_values_are_no_part_of_weights(source: Path, tmp_path: Path) -> None:
    convert(source, tmp_path / "out", default_policy(int4(32)))
    attention = "model.language_model.layers.1.self_attn"

    def add(tensors: dict[str, Tensor]) -> None:
        for name in ("k_scale", "v_scale", "k_proj.output_scale"):
            tensors[f"{attention}.{name}"] = torch.tensor(0.5)

    edit_tensors(tmp_path / "out", add)
    assert faults(tmp_path / "out") == set()


def test_transformers_does_not_read_the_draft_head(source: Path, tmp_path: Path) -> None:
    convert(source, tmp_path / "out", default_policy(int4(32)))
    edit_tensors(tmp_path / "out", lambda tensors: tensors.pop("mtp.norm.weight"))
    assert faults(tmp_path / "out", Engine.TRANSFORMERS) == set()
    assert faults(tmp_path / "out", Engine.VLLM) == {"vllm-missing"}
