"""Write what engines were seen to make of each format into docs/formats.md: python docs/make_formats.py [--check]."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

PAGE = Path(__file__).with_name("formats.md")
PROOFS = Path(__file__).with_name("formats.json")
BEGIN = "<!-- engines: written by docs/make_formats.py -->"
END = "<!-- end of engines -->"
ENGINES = ("transformers", "vLLM")
SAYS = {
    "right": "right",
    "loads right": "loads right; kernels not provable here",
    "refused": "**refused**",
    "wrong": "**wrong without a word**",
}


def table(proofs: dict[str, Any]) -> str:
    """The Markdown table: a row for each way of writing experts or linear modules, a column for each engine."""
    lines = [f"| `qconvert quantize` | what | {' | '.join(ENGINES)} |", "|---|---|" + "---|" * len(ENGINES)]
    for written, whats in sorted(proofs.items()):
        for what, engines in sorted(whats.items()):
            cells = (_cell(engines.get(engine)) for engine in ENGINES)
            lines.append(f"| `{written}` | {what} | {' | '.join(cells)} |")
    return "\n".join([*lines, "", *_sources(proofs)])


def _cell(proof: dict[str, str] | None) -> str:
    return "not run" if proof is None else f"{SAYS[proof['result']]} ({proof['version']}, {proof['date']})"


def _sources(proofs: dict[str, Any]) -> Iterator[str]:
    tests = {proof["test"] for whats in proofs.values() for engines in whats.values() for proof in engines.values()}
    yield "Each cell was written by one of these tests, after its last assertion:"
    yield ""
    yield from (f"- `{test}`" for test in sorted(tests))


def page(text: str) -> str:
    """``text`` with a fresh table between the markers."""
    before, _, rest = text.partition(BEGIN)
    _, _, after = rest.partition(END)
    return f"{before}{BEGIN}\n\n{table(json.loads(PROOFS.read_text(encoding='utf-8')))}\n\n{END}{after}"


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
