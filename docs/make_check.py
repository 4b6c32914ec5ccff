"""Write the table of engines' rules into docs/check.md: python docs/make_check.py [--check]."""

from __future__ import annotations

import sys
from pathlib import Path

from marked_table import run

from qconvert.engine_check.run import RULES

PAGE = Path(__file__).with_name("check.md")
BEGIN = "<!-- rules: written by docs/make_check.py -->"
END = "<!-- end of rules -->"


def table() -> str:
    """The Markdown table: one row a rule."""
    lines = [
        "| rule | engine | must hold | otherwise it | effect | known by | source |",
        "|---|---|---|---|---|---|---|",
    ]
    lines += [
        f"| `{rule.id}` | {rule.engine} | {rule.demands} | {rule.happens} | {rule.effect.value} | {rule.proof.value} "
        f"| {rule.source} |"
        for rule in RULES
    ]
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(run(__doc__, PAGE, BEGIN, END, table()))
