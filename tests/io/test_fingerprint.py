"""The fingerprint is that of the weights: other files do not change it, other weights do."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from qconvert.io.checkpoint import Checkpoint
from qconvert.io.fingerprint import fingerprint
from tests.checkpoints import make_tiny


def of(path: Path) -> str:
    with Checkpoint.open(path) as checkpoint:
        return fingerprint(checkpoint)


def test_files_and_times_do_not_matter(tmp_path: Path) -> None:
    make_tiny(tmp_path / "a", shards=1)
    make_tiny(tmp_path / "b", shards=4)
    assert of(tmp_path / "a") == of(tmp_path / "b")


def test_weights_and_configuration_do(tmp_path: Path) -> None:
    make_tiny(tmp_path / "a")
    found = {of(tmp_path / "a")}
    for number, options in enumerate(({"seed": 1}, {"experts": 5}, {"layout": "per-expert"}, {"dtype": torch.float32})):
        make_tiny(tmp_path / str(number), **options)
        found.add(of(tmp_path / str(number)))
    assert len(found) == 5


@pytest.mark.parametrize("name", ["norm.weight", "layers.1.self_attn.o_proj.weight", "layers.0.mlp.experts.down_proj"])
def test_every_tensor_has_its_part(name: str, tmp_path: Path) -> None:
    make_tiny(tmp_path / "a", shards=1)
    before = of(tmp_path / "a")
    path = tmp_path / "a" / "model.safetensors"
    tensors = load_file(path)
    tensors[f"model.language_model.{name}"].mul_(1.5)
    save_file(tensors, path, {"format": "pt"})
    assert of(tmp_path / "a") != before
