"""Checkpoints of any size that take no disk: true headers, an index and a configuration over files of holes."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from qconvert.arch.names import Naming, name_of
from qconvert.arch.shapes import expected_roles, expected_shape
from qconvert.core.dtypes import DType
from qconvert.io.safetensors_header import serialize_header
from qconvert.io.shard_writer import PYTORCH_METADATA
from qconvert.io.source_folder import INDEX_FILE
from qconvert.plan.layout import OutputTensor, lay_out
from reference_model.config import ModelConfig

HUB_SHARD_BYTES = 4_000_000_000


def make_sparse(
    out: Path,
    config: ModelConfig,
    config_json: Mapping[str, Any],
    *,
    per_expert: bool = False,
    shard_bytes: int = HUB_SHARD_BYTES,
) -> tuple[int, int]:
    """Write the headers of a BF16 checkpoint of ``config`` into files that are as long as they should be.

    Args:
        out: new folder.
        config: decides names and shapes.
        config_json: what is written of it.
        per_expert: one matrix an expert instead of stacked ones.
        shard_bytes: largest file.

    Returns:
        Bytes of its tensors, and its files with weights.

    Raises:
        FileExistsError: ``out`` is there already.
    """
    layout = lay_out(
        [
            (OutputTensor(name=name_of(role, Naming.VISION_LANGUAGE), dtype=DType.BF16, shape=shape),)
            for role in expected_roles(config, stacked=not per_expert)
            for shape in (expected_shape(role, config),)
        ],
        shard_bytes,
    )
    files = layout.by_file()
    out.mkdir(parents=True)
    for shard, infos in files.items():
        with (out / shard).open("wb") as file:
            file.write(serialize_header(infos, PYTORCH_METADATA))
            file.truncate(infos[-1].end)
    index = {
        "metadata": {"total_size": layout.nbytes},
        "weight_map": {info.name: info.shard for info in layout.tensors},
    }
    (out / INDEX_FILE).write_text(json.dumps(index), encoding="utf-8")
    (out / "config.json").write_text(json.dumps(config_json, indent=2), encoding="utf-8")
    return layout.nbytes, len(files)
