"""Write the table of engines' rules into docs/check.md: python docs/make_check.py [--check]."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

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


def page(text: str) -> str:
    """``text`` with a fresh table between the markers."""
    before, _, rest = text.partition(BEGIN)
    _, _, after = rest.partition(END)
    return f"{before}{BEGIN}\n\n{table()}\n\n{END}{after}"


def main() -> int:
    """Write the page, or with ``--check`` say whether it is current."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true", help="exit 1 when the page is not current")
    arguments = parser.parse_args()
    text = PAGE.read_text(encoding="utf-8")
    if arguments.check:
        return int(page(text) != text)
    PAGE.write_text(page(text), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
