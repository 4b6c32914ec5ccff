"""A shared expert that is stored as further routed experts: what ``config.json`` says of it.

A folded checkpoint has E + n experts of width F where the original has E and a shared expert of width S: the last
n = ceil(S / F) hold its units, are always on, and weigh sigmoid(x . shared_expert_gate) each. The counts that
engines read are those of what is stored, so that none of them takes it for the original; the block ``FOLD`` inside
``qconvert`` has the original ones.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from reference_model.config_fields import ConfigError, mapping, size

NOTE = "qconvert"
"""The block of ``config.json`` that tells where the weights come from; engines pass it over."""

FOLD = "folded_shared_expert"
FOLD_VERSION = 1

_COUNTS = ("num_experts", "num_experts_per_tok")
_KEPT = ("num_experts", "num_experts_per_tok", "moe_intermediate_size", "shared_expert_intermediate_size")


def note_of(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """The block ``NOTE`` of a configuration; nothing where there is none, or something else stands there."""
    note = config.get(NOTE)
    return note if isinstance(note, Mapping) else {}


def folded_count(shared: int, width: int) -> int:
    """Experts of ``width`` units that ``shared`` units fill: ceil(shared / width)."""
    return -(-shared // width)


def fold_block(text: Mapping[str, Any]) -> dict[str, int]:
    """What the block ``FOLD`` says of a decoder whose original fields are ``text``."""
    return {"version": FOLD_VERSION, **{name: text[name] for name in _KEPT}}


def original_counts(config: Mapping[str, Any], text: Mapping[str, Any]) -> tuple[dict[str, Any], int]:
    """The decoder's fields with the original counts of experts, and the number of folded experts (0 where none are).

    ``config`` is the whole file, ``text`` its fields about the decoder.

    Raises:
        ConfigError: the block is of another version, or says something else than the fields.
    """
    block = mapping(mapping(config, NOTE), FOLD, f"{NOTE}.")
    if not block:
        return dict(text), 0
    where = f"{NOTE}.{FOLD}."
    if size(block, "version", where) != FOLD_VERSION:
        raise ConfigError(f"{where}version is {block['version']}; this program reads version {FOLD_VERSION}")
    kept = {name: size(block, name, where) for name in _KEPT}
    folded = folded_count(kept["shared_expert_intermediate_size"], kept["moe_intermediate_size"])
    stored = {name: kept[name] + (folded if name in _COUNTS else 0) for name in _KEPT}
    for name, expected in stored.items():
        if text.get(name) != expected:
            raise ConfigError(
                f"{name} is {text.get(name)!r}, but {where}{name} {kept[name]} and {folded} folded experts make it "
                f"{expected}"
            )
    return {**text, **kept}, folded
