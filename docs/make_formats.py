"""Write what engines were seen to make of each format into docs/formats.md: python docs/make_formats.py [--check]."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from marked_table import run

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


if __name__ == "__main__":
    sys.exit(run(__doc__, PAGE, BEGIN, END, table(json.loads(PROOFS.read_text(encoding="utf-8")))))
