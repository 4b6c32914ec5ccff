"""The file in which ModelOpt describes a quantized checkpoint whose ``config.json`` says nothing of it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from qconvert.core.tensor_info import TensorInfo
from qconvert.io.source_folder import read_whole
from qconvert.io.strict_json import parse_object

QUANTIZATION_FILE = "hf_quant_config.json"
_BLOCK = "quantization_config"


def quantization_beside(
    path: Path, config: Mapping[str, Any], names: Iterable[str], tensors: Iterable[TensorInfo]
) -> tuple[dict[str, Any], bytes] | None:
    """``config`` with the ``quantization_config`` that a file of the folder holds, and the bytes of that file.

    ``None`` where ``config`` has the block itself, where there is no such file, and where nothing is quantized: then it
    tells of another checkpoint. Engines look for it in the same order (vLLM 0.32).

    Args:
        path: the folder.
        config: its parsed ``config.json``.
        names: of the files in it.
        tensors: everything that is stored.

    Raises:
        SourceError: the file cannot be read, or holds no JSON object.
    """
    text = config.get("text_config")
    if config.get(_BLOCK) or (isinstance(text, Mapping) and text.get(_BLOCK)) or QUANTIZATION_FILE not in names:
        return None
    if all(info.dtype.is_weight for info in tensors):
        return None
    raw = read_whole(path / QUANTIZATION_FILE)
    told = parse_object(raw, str(path / QUANTIZATION_FILE))
    return {**config, _BLOCK: {"quant_method": "modelopt", **told}}, raw
