"""transformers as an engine whose states are saved, right or tampered with."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, DynamicCache

Between = Callable[[Any], Any]
"""What is done to the cache between two calls; gives the cache of the next one."""


def engine(folder: Path, dtype: torch.dtype = torch.float32) -> Any:
    """The model of a checkpoint folder."""
    return AutoModelForCausalLM.from_pretrained(
        folder, dtype=dtype, experts_implementation="eager", attn_implementation="eager"
    ).eval()


@torch.no_grad()
def record(
    model: Any,
    ids: Tensor,
    *,
    mask: Tensor | None = None,
    calls: tuple[int, ...] = (),
    positions: Tensor | None = None,
    between: Between = lambda cache: cache,
) -> dict[str, Tensor]:
    """All states of a run over ids [B, T], under the names of a file of states."""
    heard: dict[str, list[Tensor]] = {}

    def listen(name: str, module: Any) -> Any:
        def hear(_module: Any, _given: Any, made: Any) -> None:
            heard.setdefault(name, []).append(made[0] if isinstance(made, tuple) else made)

        return module.register_forward_hook(hear)

    handles = [listen("embeddings", model.model.embed_tokens)]
    for n, layer in enumerate(model.model.layers):
        mixer = layer.linear_attn if layer.block_type == "linear_attention" else layer.self_attn
        for name, module in {"mixer": mixer, "moe": layer.mlp, "router": layer.mlp.gate, "hidden": layer}.items():
            handles.append(listen(f"layers.{n}.{name}", module))
    cache, begin, logits = DynamicCache(config=model.config), 0, []
    for count in calls or (ids.shape[1],):
        part = slice(begin, begin + count)
        out = model(
            ids[:, part],
            attention_mask=None if mask is None else mask[:, : begin + count],
            position_ids=(torch.arange(ids.shape[1]).expand(ids.shape) if positions is None else positions)[:, part],
            past_key_values=cache,
            use_cache=True,
        )
        cache, begin = between(out.past_key_values), begin + count
        logits.append(out.logits)
    for handle in handles:
        handle.remove()
    rows = len(ids)
    told = {
        name: torch.cat([one.reshape(rows, -1, one.shape[-1]) for one in parts], 1) for name, parts in heard.items()
    }
    told |= {"tokens": ids, "logits": torch.cat(logits, 1)}
    if mask is not None:
        told["mask"] = mask
    if calls:
        told["calls"] = torch.tensor(calls)
    return told


def without(run: Mapping[str, Tensor], *kinds: str) -> dict[str, Tensor]:
    """A run that does not tell some of the states of layers."""
    return {name: tensor for name, tensor in run.items() if name.rpartition(".")[2] not in kinds}
