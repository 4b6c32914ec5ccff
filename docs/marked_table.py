"""A page with a generated part between two markers, written or held to be current."""

from __future__ import annotations

import argparse
from pathlib import Path


def run(description: str | None, page: Path, begin: str, end: str, content: str) -> int:
    """Put ``content`` between the markers of ``page``; with ``--check`` return 1 when something else stands there."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--check", action="store_true", help="exit 1 when the page is not current")
    arguments = parser.parse_args()
    text = page.read_text(encoding="utf-8")
    before, _, rest = text.partition(begin)
    _, _, after = rest.partition(end)
    fresh = f"{before}{begin}\n\n{content}\n\n{end}{after}"
    if arguments.check:
        return int(fresh != text)
    page.write_text(fresh, encoding="utf-8")
    return 0
