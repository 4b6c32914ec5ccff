"""Which tokens end a text: what ``generation_config.json`` says, or else the configuration."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from qconvert.io.source_folder import read_whole
from qconvert.io.strict_json import parse_object
from reference_model.config import TextConfig

_GENERATION_CONFIG = "generation_config.json"


def generation_config(folder: Path) -> Mapping[str, Any]:
    """What the folder says of generation; nothing where it has no such file.

    Raises:
        SourceError: the file is damaged.
    """
    path = folder / _GENERATION_CONFIG
    return parse_object(read_whole(path), str(path)) if path.is_file() else {}


def end_tokens(config: TextConfig, generation: Mapping[str, Any]) -> tuple[int, ...]:
    """Ids of all tokens that end a text."""
    found = generation.get("eos_token_id", config.eos_token_ids)
    return (found,) if isinstance(found, int) else tuple(found or ())
