"""The checkpoint of the benchmarks is a real one: its shapes, its configuration, the same bytes every time."""

from __future__ import annotations

import importlib.util
import json
from dataclasses import replace
from pathlib import Path
from types import ModuleType

import pytest
import torch

from qconvert.arch.census import check
from qconvert.arch.families import read_config
from qconvert.io.checkpoint import Checkpoint
from reference_model.config import ModelConfig
from reference_model.presets import PRESETS
from tests.checkpoints import tiny_config


@pytest.fixture(scope="module")
def script() -> ModuleType:
    path = Path(__file__).parents[2] / "benchmarks" / "make_synthetic.py"
    spec = importlib.util.spec_from_file_location("make_synthetic", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(autouse=True)
def _threads() -> object:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("per_expert", [False, True])
@pytest.mark.parametrize("whole", [False, True])
def test_it_fits_its_configuration(tmp_path: Path, script: ModuleType, per_expert: bool, whole: bool) -> None:
    config = script.shrink(ModelConfig.from_dict(tiny_config()), 2, mtp=whole, vision=whole)
    nbytes = script.make(tmp_path / "out", config, per_expert=per_expert, shard_bytes=100_000)
    with Checkpoint.open(tmp_path / "out") as checkpoint:
        assert read_config(checkpoint.config, tmp_path) == config
        census = check(checkpoint.tensors, config)
        assert census.notes == ()
        assert census.nbytes == nbytes
        assert len({info.shard for info in checkpoint.tensors.values()}) > 3
        head = checkpoint.read("lm_head.weight").float()
        assert abs(head.std() - 0.02) < 0.001
        assert abs(head.mean()) < 0.001


@pytest.mark.parametrize("name", PRESETS)
@pytest.mark.parametrize("yarn", [False, True])
def test_every_field_of_a_configuration_reads_back(script: ModuleType, name: str, yarn: bool) -> None:
    config = PRESETS[name]
    if yarn:
        long = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 262_144, "rope_theta": 5e6}
        rare = {"beta_fast": 30.0, "beta_slow": 2.0, "attention_factor": 1.2, "mscale": 0.9, "mscale_all_dim": 0.8}
        rope = replace(config.text.rope, **long, **rare, truncate=False)
        vision = replace(config.vision, rope_theta=5e3)
        config = replace(config, text=replace(config.text, rope=rope), vision=vision)
    assert ModelConfig.from_dict(json.loads(json.dumps(script.config_json(config)))) == config


def test_the_same_options_give_the_same_bytes(tmp_path: Path, script: ModuleType) -> None:
    config = script.shrink(ModelConfig.from_dict(tiny_config()), 1, mtp=False, vision=False)
    for name, options in (("a", {"jobs": 1}), ("b", {"jobs": 3}), ("c", {"seed": 1})):
        script.make(tmp_path / name, config, **options)
    a, b, c = ((tmp_path / name / "model.safetensors").read_bytes() for name in "abc")
    assert a == b
    assert a != c


@pytest.mark.parametrize("size", PRESETS)
def test_configurations_of_every_size_read_back(size: str, script: ModuleType) -> None:
    assert ModelConfig.from_dict(script.config_json(PRESETS[size])) == PRESETS[size]
