"""All outputs of a report in one folder, each whole or not at all."""

from __future__ import annotations

import json
import os
from pathlib import Path

from qconvert.core.errors import OutputError
from qconvert.parity.outputs.document import as_document
from qconvert.parity.outputs.junit import as_junit
from qconvert.parity.outputs.markdown import as_markdown
from qconvert.parity.outputs.model_card import as_model_card
from qconvert.parity.outputs.page import as_page
from qconvert.parity.report import ParityReport

JSON_NAME = "parity.json"
MARKDOWN_NAME = "parity.md"
PAGE_NAME = "report.html"
JUNIT_NAME = "junit.xml"
CARD_NAME = "model-card.md"
POLICY_NAME = "policy.toml"


def write_report(report: ParityReport, folder: Path) -> tuple[Path, ...]:
    """Write every output into ``folder``; gives their paths, the one for programs first.

    Raises:
        OutputError: the folder cannot be made or written.
    """
    texts = {
        JSON_NAME: json.dumps(as_document(report), indent=1, allow_nan=False) + "\n",
        MARKDOWN_NAME: as_markdown(report),
        PAGE_NAME: as_page(report),
        JUNIT_NAME: as_junit(report),
        CARD_NAME: as_model_card(report, Path(report.converted).name or report.converted),
    }
    if report.attribution is not None and report.attribution.policy:
        texts[POLICY_NAME] = report.attribution.policy
    try:
        folder.mkdir(parents=True, exist_ok=True)
        return tuple(replace_text(folder / name, text) for name, text in texts.items())
    except OSError as error:
        raise OutputError(f"cannot write the report into {folder}: {error.strerror}") from error


def replace_text(path: Path, text: str) -> Path:
    """Write beside ``path`` and rename over it: readers see the old file or the new one."""
    beside = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        # what JSON smuggled in as half a character can be written out, not encoded
        beside.write_bytes(text.encode("utf-8", "backslashreplace"))
        beside.replace(path)
    finally:
        beside.unlink(missing_ok=True)
    return path
