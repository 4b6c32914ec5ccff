"""Where a checkpoint keeps its tokenizer and its chat template."""

from __future__ import annotations

from pathlib import Path

from qconvert.core.errors import SourceError
from qconvert.io.strict_json import parse_object

TOKENIZER = "tokenizer.json"
TOKENIZER_CONFIG = "tokenizer_config.json"
TEMPLATE = "chat_template.jinja"

TEMPLATE_KEY = "chat_template"
_TEMPLATE_HOMES = ("chat_template.json", TOKENIZER_CONFIG)


def chat_template(folder: Path) -> str | None:
    """The chat template of a checkpoint, of several the one that is called default; ``None`` without one."""
    found = stored_template(folder)
    if isinstance(found, list):
        named = {one.get("name"): one.get("template") for one in found if isinstance(one, dict)}
        found = named.get("default")
    return found if isinstance(found, str) else None


def stored_template(folder: Path) -> object:
    """The chat template, whichever file holds it; ``None`` without one."""
    raw = bytes_of(folder / TEMPLATE)
    if raw is not None:
        return raw.decode("utf-8", "replace")
    for name in _TEMPLATE_HOMES:
        content = bytes_of(folder / name)
        try:
            found = None if content is None else parse_object(content, name).get(TEMPLATE_KEY)
        except SourceError:
            continue
        if found is not None:
            return found
    return None


def bytes_of(path: Path) -> bytes | None:
    """The file's bytes; ``None`` for one that is missing, no file, or unreadable: to an engine these are the same."""
    try:
        return path.read_bytes() if path.is_file() else None
    except OSError:
        return None
