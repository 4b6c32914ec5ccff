"""Damage to checkpoints on disk."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor


def edit_tensors(path: Path, change: Callable[[dict[str, Tensor]], object]) -> None:
    """Rewrite the weights of a checkpoint, index included, after ``change`` has edited all tensors in place."""
    shards = {shard: load_file(shard) for shard in sorted(path.glob("*.safetensors"))}
    home = {name: shard for shard, tensors in shards.items() for name in tensors}
    together = {name: tensor for tensors in shards.values() for name, tensor in tensors.items()}
    change(together)
    first = next(iter(shards))
    for shard in shards:
        mine = {name: tensor.contiguous() for name, tensor in together.items() if home.get(name, first) == shard}
        save_file(mine, shard, {"format": "pt"})
    index = path / "model.safetensors.index.json"
    if index.exists():
        parsed = json.loads(index.read_text(encoding="utf-8"))
        parsed["weight_map"] = {name: home.get(name, first).name for name in together}
        index.write_text(json.dumps(parsed), encoding="utf-8")


def edit_quantization(path: Path, **changes: Any) -> None:
    """Change entries of the ``quantization_config`` block."""
    config = json.loads((path / "config.json").read_text(encoding="utf-8"))
    config["quantization_config"] |= changes
    (path / "config.json").write_text(json.dumps(config), encoding="utf-8")


def quantization_of(path: Path) -> dict[str, Any]:
    """The ``quantization_config`` block."""
    block: dict[str, Any] = json.loads((path / "config.json").read_text(encoding="utf-8"))["quantization_config"]
    return block


def round_inputs_to_four_bits(path: Path, scale: Callable[[str], float] = lambda module: 1.0) -> None:
    """Make W4A4 of NVFP4: ``scale`` is the ``input_global_scale`` of a module."""
    inputs = {
        "num_bits": 4, "type": "float", "strategy": "tensor_group", "group_size": 16, "dynamic": "local",
        "scale_dtype": "torch.float8_e4m3fn",
    }  # fmt: skip
    groups = quantization_of(path)["config_groups"]
    edit_quantization(path, config_groups={name: one | {"input_activations": inputs} for name, one in groups.items()})

    def add(tensors: dict[str, Tensor]) -> None:
        for name in [name for name in tensors if name.endswith(".weight_global_scale")]:
            module = name.removesuffix(".weight_global_scale")
            tensors[f"{module}.input_global_scale"] = torch.tensor([scale(module)])

    edit_tensors(path, add)
