"""A plan as JSON: for people, for diffs and for whoever checks a conversion before it runs."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from qconvert.core.plan import Mosaic, Plan, Quantize, Reencode, Step
from qconvert.core.tensor_info import TensorInfo


def plan_text(plan: Plan, beside: Mapping[str, Any] | None = None) -> Iterator[str]:
    """Everything that the plan decided, in plan order, as parts of one JSON document with sorted keys.

    In parts, because the document of a large checkpoint is 140 MB and takes ten times as much as one object.

    Args:
        plan: what is decided.
        beside: further keys of the document, of what the plan was made from; none of the plan's own.
    """
    large = {"layout": map(_place, plan.layout.tensors), "steps": map(_step, plan.steps)}
    small = {
        **(beside or {}),
        "config": plan.config,
        "left_out": dict(plan.left_out),
        "policy_hash": plan.policy_hash,
        "side_files": list(plan.side_files),
        "source_hash": plan.source_hash,
    }
    separator = "{"
    for key in sorted({*large, *small}):
        yield f'{separator}\n  "{key}": '
        if key in large:
            yield from _list(large[key])
        else:
            yield _text(small[key], 1)
        separator = ","
    yield "\n}\n"


def _list(entries: Iterable[dict[str, Any]]) -> Iterator[str]:
    separator = "["
    for entry in entries:
        yield f"{separator}\n    {_text(entry, 2)}"
        separator = ","
    yield "\n  ]"


def _text(value: Any, depth: int) -> str:
    return json.dumps(value, indent=2, sort_keys=True).replace("\n", "\n" + "  " * depth)


def _place(info: TensorInfo) -> dict[str, Any]:
    return {
        "name": info.name,
        "dtype": info.dtype.value,
        "shape": list(info.shape),
        "shard": info.shard,
        "begin": info.begin,
        "end": info.end,
    }


def _step(step: Step) -> dict[str, Any]:
    action, packed = step.action, step.packed
    stored: dict[str, Any] = {}
    if isinstance(action, Quantize | Reencode):
        stored["format"] = action.format
    if isinstance(action, Quantize):
        stored["search"] = action.search
        if action.method is not None:
            stored["method"] = action.method
    return {
        "inputs": [{"tensor": part.tensor, "rows": [part.begin, part.end]} for part in step.inputs],
        "role": str(step.role),
        "action": str(action.scheme) if isinstance(action, Quantize) else str(action),
        "reason": action.reason,
        **stored,
        **({} if packed is None else {"source": {"format": packed.format, "scheme": str(packed.scheme)}}),
        **({} if step.mosaic is None else {"mosaic": _mosaic(step.mosaic)}),
        "outputs": list(step.outputs),
        "peak_bytes": step.peak_bytes,
    }


def _mosaic(mosaic: Mosaic) -> dict[str, Any]:
    tiles = [
        {
            "tensor": tile.reading.inputs[0].tensor,
            "rows": [tile.reading.inputs[0].begin + row for row in tile.rows],
            "cols": list(tile.cols),
            "at": list(tile.at),
        }
        for tile in mosaic.tiles
    ]
    return {"shape": list(mosaic.shape), "tiles": tiles}
