"""Write the table of every tensor into docs/architecture.md: python docs/make_architecture.py [--check]."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

from marked_table import run

from qconvert.arch.names import Naming, name_of
from qconvert.arch.shapes import expected_roles, expected_shape, is_linear_weight, kept_by_nature
from qconvert.core.role import Kind, TensorRole
from qconvert.core.scheme import int4
from qconvert.plan.policy import default_policy
from reference_model.presets import PRESETS

PAGE = Path(__file__).with_name("architecture.md")
BEGIN = "<!-- tensors: written by docs/make_architecture.py -->"
END = "<!-- end of tensors -->"
SIZE = "35b-a3b"
EXACT = (Kind.LINEAR_A_LOG, Kind.LINEAR_DT_BIAS)
"""Decay parameters, which some checkpoints store wider than the rest."""


def rows() -> Iterator[tuple[str, str, str, str, str]]:
    """(name, role, shape, element type, what it is), one row per kind of tensor, at the shapes of 35B-A3B."""
    config = PRESETS[SIZE]
    seen: set[tuple[object, ...]] = set()
    for stacked in (True, False):
        for role in expected_roles(config, stacked=stacked):
            key = (role.section, role.kind, role.part, role.expert is None)
            if key in seen:
                continue
            seen.add(key)
            name = name_of(role, Naming.VISION_LANGUAGE)
            for number, letter in ((role.layer, "L"), (role.expert, "N")):
                if number is not None:
                    name = name.replace(f".{number}.", f".{letter}.", 1)
            yield name, role.path, " x ".join(map(str, expected_shape(role, config))), _dtype(role), _nature(role)


def _nature(role: TensorRole) -> str:
    if is_linear_weight(role):
        rounded = default_policy(int4()).decide(role).scheme is not None
        return "matrix, rounded by default" if rounded else "matrix, kept unless a policy rounds it"
    return kept_by_nature(role) or ""


def _dtype(role: TensorRole) -> str:
    return "BF16 or F32" if role.kind in EXACT else "BF16"


def table() -> str:
    """The Markdown table."""
    lines = ["| tensor | role | shape | stored as | |", "|---|---|---|---|---|"]
    lines += [f"| `{name}` | `{path}` | {shape} | {dtype} | {nature} |" for name, path, shape, dtype, nature in rows()]
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(run(__doc__, PAGE, BEGIN, END, table()))
