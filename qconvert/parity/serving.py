"""What engines read beside the weights: tokenizer, chat template, processors, generation settings, special tokens."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path
from typing import Any

from qconvert.core.errors import SourceError
from qconvert.io.strict_json import parse_object
from qconvert.parity.causes import Cause, CauseKind, Severity, cause
from qconvert.texts.template import TEMPLATE, TEMPLATE_KEY, TOKENIZER, TOKENIZER_CONFIG, bytes_of, stored_template
from reference_model.config import ModelConfig, TextConfig, VisionConfig

OTHER_FILES = (
    TOKENIZER_CONFIG,
    "vocab.json",
    "merges.txt",
    "special_tokens_map.json",
    "added_tokens.json",
    "generation_config.json",
    "processor_config.json",
    "preprocessor_config.json",
    "video_preprocessor_config.json",
)
"""Missing or different, they are warnings: engines start, and answer otherwise than the original."""

_SAYS_NOTHING = frozenset({"transformers_version", "_from_model_config", "name_or_path", TEMPLATE_KEY})
"""Keys of these files that no engine computes with; the template is compared by itself."""

_NEVER_READ = frozenset({"initializer_range", "router_aux_loss_coef"})
"""Fields of the configuration that only training reads."""

_NOT_COMPUTED_WITH = frozenset({"eos_token_ids", "max_position_embeddings", "mtp_num_hidden_layers"})
"""Fields that change no logit, but where and how fast generation goes: warnings."""


def config_causes(ours: ModelConfig, theirs: ModelConfig) -> Iterator[Cause]:
    """Fields of ``config.json`` that change what is computed.

    Those of images and videos are left to the cause of a dropped vision tower where only the original has one.
    """
    yield from _differences(ours.text, theirs.text, TextConfig, "")
    if ours.vision is None or theirs.vision is None:
        return
    yield from _differences(ours.vision, theirs.vision, VisionConfig, "vision_config.")
    for one in fields(ModelConfig):
        if one.name.endswith("_token_id"):
            yield from _difference(one.name, getattr(ours, one.name), getattr(theirs, one.name))


def _differences(ours: object, theirs: object, kind: type[TextConfig | VisionConfig], prefix: str) -> Iterator[Cause]:
    for one in fields(kind):
        if one.name not in _NEVER_READ:
            severity = Severity.WARNING if one.name in _NOT_COMPUTED_WITH else None
            yield from _difference(prefix + one.name, getattr(ours, one.name), getattr(theirs, one.name), severity)


def _difference(name: str, before: object, after: object, severity: Severity | None = None) -> Iterator[Cause]:
    if before != after:
        text = f"{name} is {'missing' if after is None else after}, the original has {before}"
        yield cause(CauseKind.CONFIG, None, text, where="config.json", severity=severity)


def serving_causes(original: Path, converted: Path) -> Iterator[Cause]:
    """Files that the original has and the converted folder lacks or has otherwise.

    JSON is compared by content. A chat template is the same wherever the two keep it.
    """
    if bytes_of(original / TOKENIZER) is not None:
        if bytes_of(converted / TOKENIZER) is None:
            yield _cause(TOKENIZER, "is missing: text cannot become tokens", Severity.ERROR)
        elif _content(original / TOKENIZER) != _content(converted / TOKENIZER):
            yield _cause(TOKENIZER, "differs from the original's: the same text may become other tokens")
    template, kept = stored_template(original), stored_template(converted)
    if template is not None and kept is None:
        yield _cause(TEMPLATE, "the chat template is missing: engines cannot frame a conversation", Severity.ERROR)
    elif template is not None and template != kept:
        yield _cause(TEMPLATE, "the chat template differs from the original's")
    for name in OTHER_FILES:
        before, after = _content(original / name), _content(converted / name)
        if before is not None and after is None:
            yield _cause(name, "is missing in the converted checkpoint")
        elif before is not None and before != after:
            yield _cause(name, f"differs from the original's{_keys(before, after)}")


def _cause(name: str, text: str, severity: Severity = Severity.WARNING) -> Cause:
    return cause(CauseKind.SERVING, None, text, where=name, severity=severity)


def _keys(before: object, after: object) -> str:
    if not isinstance(before, dict) or not isinstance(after, dict):
        return ""
    changed = sorted(key for key in before.keys() | after.keys() if before.get(key) != after.get(key))
    return f": {', '.join(changed)}"


def _content(path: Path) -> dict[str, Any] | bytes | None:
    """What the file says: an object without the keys that say nothing, or its bytes where it is none."""
    raw = bytes_of(path)
    if raw is None or path.suffix != ".json":
        return raw
    try:
        parsed = parse_object(raw, path.name)
    except SourceError:
        return raw
    return {key: value for key, value in parsed.items() if key not in _SAYS_NOTHING}
