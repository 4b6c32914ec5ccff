"""``rope_parameters``: the rotary embedding of a decoder, and the block that says it whole."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from reference_model.config_fields import ConfigError, flag, is_count, positive

_PUBLIC = {
    "rope_type": "default",
    "rope_theta": 10_000_000,
    "partial_rotary_factor": 0.25,
    "mrope_section": [11, 11, 10],
    "mrope_interleaved": True,
}
_PUBLIC_YARN = {"factor": 4.0, "original_max_position_embeddings": 262_144}


def whole_rope_block(*blocks: object) -> str:
    """What ``rope_parameters`` should be, as JSON behind a line of words.

    Every field is that of the last of ``blocks`` that has it, and of the public checkpoints where none has. Whatever is
    no JSON object is passed over.
    """
    given = {name: value for block in blocks if isinstance(block, Mapping) for name, value in block.items()}
    if "type" in given:
        given["rope_type"] = given.pop("type")
    whole = {**_PUBLIC, **(_PUBLIC_YARN if given.get("rope_type") == "yarn" else {}), **given}
    words = "The whole block, where the config says nothing as in the public checkpoints, belongs into the text config:"
    return f'{words}\n"rope_parameters": {json.dumps(whole, indent=2)}'


def rope_fields_outside(text: Mapping[str, Any]) -> dict[str, Any]:
    """Fields of ``rope_parameters`` that a text config has beside that block, as older ones do."""
    return {name: text[name] for name in _PUBLIC if text.get(name) is not None}


@dataclass(frozen=True, slots=True, kw_only=True)
class RopeParameters:
    """Rotary embedding: base, rotated fraction of a head, interleaved mRoPE sections, YaRN when named.

    Attributes:
        mrope_section: frequencies given to time, height and width; they sum to half the rotary dimension.
        factor: YaRN's context extension factor; ``None`` for plain RoPE.
    """

    rope_type: Literal["default", "yarn"] = "default"
    rope_theta: float = 10_000_000.0
    partial_rotary_factor: float = 0.25
    mrope_section: tuple[int, int, int] = (11, 11, 10)
    factor: float | None = None
    original_max_position_embeddings: int | None = None
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    attention_factor: float | None = None
    mscale: float | None = None
    mscale_all_dim: float | None = None
    truncate: bool = True

    @classmethod
    def from_dict(cls, block: Mapping[str, Any], outside: Mapping[str, Any] | None = None) -> RopeParameters:
        """Read a ``rope_parameters`` block; ``outside``, fields that stand beside it, is for messages alone.

        Raises:
            ConfigError: unknown rope type, theta or sections missing, sections that are not or cannot be interleaved,
                or YaRN without its factor and original length.
        """
        rope_type = block.get("rope_type", block.get("type", "default"))
        if rope_type not in ("default", "yarn"):
            raise ConfigError(f"rope_parameters.rope_type is {rope_type!r}; only 'default' and 'yarn' are known")
        for name in ("rope_theta", "mrope_section"):
            if name not in block:
                raise ConfigError(
                    f"rope_parameters has no {name!r}: engines would silently fall back to another value. "
                    f"{whole_rope_block(outside, block)}"
                )
        if block.get("mrope_interleaved", True) is not True:
            raise ConfigError("rope_parameters.mrope_interleaved is false; this architecture interleaves its sections")
        section = block["mrope_section"]
        if not isinstance(section, (list, tuple)) or len(section) != 3 or not all(is_count(n) for n in section):
            raise ConfigError(f"rope_parameters.mrope_section is {section!r}; expected three counts")
        if 3 * section[1] - 1 > sum(section) or 3 * section[2] > sum(section):
            # height takes planes 1, 4, 7, ... and width 2, 5, 8, ...: beyond the last plane, engines drop them silently
            raise ConfigError(
                f"rope_parameters.mrope_section is {list(section)}: height and width do not fit between the "
                f"{sum(section)} frequencies, of which each may take every third"
            )
        for name in ("factor", "original_max_position_embeddings"):
            if rope_type == "yarn" and block.get(name) is None:
                raise ConfigError(
                    f"rope_parameters.rope_type is 'yarn' but no {name!r} is given: engines would derive it from "
                    f"another field. {whole_rope_block(outside, block)}"
                )

        def optional(name: str) -> float | None:
            return None if block.get(name) is None else positive(block, name, 0.0, "rope_parameters.")

        original = optional("original_max_position_embeddings")
        return cls(
            rope_type=rope_type,
            rope_theta=positive(block, "rope_theta", 0.0, "rope_parameters."),
            partial_rotary_factor=positive(block, "partial_rotary_factor", 0.25, "rope_parameters."),
            mrope_section=(section[0], section[1], section[2]),
            factor=optional("factor"),
            original_max_position_embeddings=None if original is None else int(original),
            beta_fast=optional("beta_fast") or 32.0,
            beta_slow=optional("beta_slow") or 1.0,
            attention_factor=optional("attention_factor"),
            mscale=optional("mscale"),
            mscale_all_dim=optional("mscale_all_dim"),
            truncate=flag(block, "truncate", True),
        )
