"""A trained decoder as a checkpoint folder: names, dtypes, shards and the index."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from calibration.tokenizer import write_json
from reference_model.model import CausalLM
from reference_model.vision import VisionTower

SHARDS = 2


def checkpoint_tensors(model: CausalLM, vision: VisionTower) -> dict[str, Tensor]:
    """All tensors under their names in a checkpoint, rounded to what is stored.

    Everything is BF16 but ``A_log``, which is FP32, so that converters meet both types; its values are rounded to BF16
    all the same, so that an engine that casts it reads the number that was measured.
    """
    tensors: dict[str, Tensor] = {}
    for name, weight in model.state_dict().items():
        plain = name.startswith(("lm_head.", "mtp."))
        tensors[name if plain else f"model.language_model.{name}"] = _stored(name, weight)
    for name, weight in vision.state_dict().items():
        tensors[f"model.visual.{name}"] = _stored(name, weight)
    return tensors


def _stored(name: str, weight: Tensor) -> Tensor:
    rounded = weight.detach().to(torch.bfloat16)
    return rounded.float() if name.endswith("A_log") else rounded.contiguous()


def round_as_stored(model: CausalLM) -> None:
    """Give the model the values that its checkpoint will hold."""
    with torch.no_grad():
        for name, weight in model.named_parameters():
            weight.copy_(_stored(name, weight))


def save_checkpoint(tensors: dict[str, Tensor], folder: Path) -> int:
    """Write the shards and their index; gives the bytes of all tensors.

    The first shard takes the vision tower, the embedding and the first layers, the last one what remains and the
    multi-token prediction head.
    """
    total = sum(tensor.nbytes for tensor in tensors.values())
    parts: list[dict[str, Tensor]] = [{} for _ in range(SHARDS)]
    filled = 0
    for name in sorted(tensors, key=_place):
        shard = SHARDS - 1 if name.startswith("mtp.") else min(filled * SHARDS // total, SHARDS - 1)
        parts[shard][name] = tensors[name]
        filled += tensors[name].nbytes
    weight_map: dict[str, str] = {}
    for number, part in enumerate(parts, start=1):
        file = f"model-{number:05d}-of-{SHARDS:05d}.safetensors"
        save_file(part, folder / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(part, file)
    index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
    write_json(folder / "model.safetensors.index.json", index)
    return total


def _place(name: str) -> tuple[int, str]:
    for rank, part in enumerate(("model.visual.", "model.language_model.embed", "model.language_model.layers.")):
        if name.startswith(part):
            return rank, name
    return (4 if name.startswith("mtp.") else 3), name
