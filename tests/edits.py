"""Damage to checkpoints on disk."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

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
