"""The numbers for a model card on the Hugging Face hub: front matter with ``model-index``, and a table.

The layout is that of the hub's model-card metadata; every string is JSON, which YAML reads as it is, so that no name
can end the front matter.
"""

from __future__ import annotations

import json
import math
from typing import Any

from qconvert import __version__
from qconvert.core.metric import Metric
from qconvert.parity.because import interval
from qconvert.parity.outputs.markdown import code, prose, table
from qconvert.parity.outputs.sections import HEADLINES, printable, words
from qconvert.parity.report import ParityReport


def as_model_card(report: ParityReport, name: str) -> str:
    """Front matter and a section to paste into the ``README.md`` of the model ``name``."""
    numbers = [
        one for one in report.metrics if one.name in HEADLINES and one.where == "as served" and one.layer is None
    ]
    numbers += [one for one in report.metrics if one.name == "sqnr" and one.where == "all quantized tensors"]
    rows = [(prose(words(one.name)), interval(one)) for one in numbers]
    schemes = sorted({one.scheme for one in report.roles if one.scheme})
    told = [
        f"Compared with {code(report.original)} by `qconvert parity` {__version__}: **{report.verdict.value}**.",
        prose(report.because),
        f"Rounded as {', '.join(map(code, schemes))}." if schemes else "",
        f"{report.tokens:,} tokens, {prose(report.text)}; brackets are 95% intervals." if report.tokens else "",
        table(("number", "value, as served"), rows) if rows else "",
    ]
    head = {"model-index": [{"name": name, "results": [_result(report, numbers)] if numbers else []}]}
    body = "\n\n".join(part for part in told if part)
    return f"---\n{_yaml(head)}\n---\n\n## What quantization cost\n\n{body}\n"


def _result(report: ParityReport, numbers: list[Metric]) -> dict[str, Any]:
    return {
        "task": {"type": "text-generation"},
        "dataset": {"type": "text", "name": printable(report.text) or "none: weights alone"},
        "metrics": [
            {"type": one.name, "name": f"{words(one.name)}{f', {one.unit}' if one.unit else ''}", "value": one.value}
            for one in numbers
            if math.isfinite(one.value)
        ],
    }


def _yaml(value: dict[str, Any]) -> str:
    """JSON in the block style of its top level, all else in flow style."""
    return "\n".join(f"{key}: {json.dumps(inner, indent=2)}" for key, inner in value.items())
