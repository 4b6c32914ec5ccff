"""The ``quantization_config`` block read: which format and scheme it declares for a module."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from qconvert.core.errors import SourceError
from qconvert.formats.declaration import Declared, NothingDeclared
from qconvert.formats.read_auto_round import read_auto_round
from qconvert.formats.read_bitsandbytes import read_bitsandbytes
from qconvert.formats.read_compressed_tensors import read_compressed_tensors
from qconvert.formats.read_fp8 import read_fp8
from qconvert.formats.read_gptq import read_awq, read_gptq
from qconvert.formats.read_modelopt import read_modelopt

_READERS: Mapping[str, Callable[[Mapping[str, Any]], Declared]] = {
    "compressed-tensors": read_compressed_tensors,
    "fp8": read_fp8,
    "gptq": read_gptq,
    "awq": read_awq,
    "auto-round": read_auto_round,
    "bitsandbytes": read_bitsandbytes,
    "modelopt": read_modelopt,
}


def read_declared(config: Mapping[str, Any]) -> Declared:
    """Read the ``quantization_config`` of a parsed ``config.json``.

    Raises:
        SourceError: a method, format or argument that cannot be read here; the message names it.
    """
    block = config.get("quantization_config")
    if block is None and isinstance(config.get("text_config"), Mapping):
        block = config["text_config"].get("quantization_config")
    if block is None:
        return NothingDeclared()
    if not isinstance(block, Mapping):
        raise SourceError("config.json: quantization_config is no object")
    method = block.get("quant_method")
    if not isinstance(method, str) or method not in _READERS:
        raise SourceError(f"config.json: quant_method is {method!r}; checkpoints of {', '.join(_READERS)} can be read")
    return _READERS[method](block)
