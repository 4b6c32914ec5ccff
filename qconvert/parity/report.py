"""What a comparison found, as a record, as JSON with stable keys and as Markdown for people."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qconvert.core.errors import OutputError
from qconvert.core.metric import Metric, Verdict
from qconvert.parity.causes import Cause, Severity
from qconvert.parity.series import Curve, ExpertUse
from qconvert.parity.tensors import RoleSummary, TensorComparison

SCHEMA = "qconvert-parity/2"
JSON_NAME = "parity.json"
MARKDOWN_NAME = "parity.md"
WORST = 20
"""Tensors that the Markdown lists."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ParityReport:
    """A comparison of two checkpoints.

    Attributes:
        original: as the user named it.
        converted: the same.
        bytes_original: bytes of all tensors.
        causes: faults that were named, worst first.
        metrics: every number with its verdict.
        tensors: those that are not identical, worst first.
        identical: tensors that are bit for bit the same.
        roles: tensors together by role, worst first.
        text: what the models were run on; empty when they were not.
        tokens: positions that were scored.
        notes: what a reader must know to read the numbers.
        curves: pictures of the model metrics.
        experts: how often each was used, and what rounding cost it.
    """

    original: str
    converted: str
    bytes_original: int
    bytes_converted: int
    causes: tuple[Cause, ...]
    metrics: tuple[Metric, ...]
    tensors: tuple[TensorComparison, ...]
    identical: int
    roles: tuple[RoleSummary, ...]
    text: str
    tokens: int
    notes: tuple[str, ...] = ()
    curves: tuple[Curve, ...] = ()
    experts: tuple[ExpertUse, ...] = ()

    @property
    def verdict(self) -> Verdict:
        """``FAIL`` for a cause that is an error or a limit that is exceeded, else ``AMBIGUOUS`` for one that may be."""
        verdicts = {metric.verdict for metric in self.metrics}
        if any(one.severity is Severity.ERROR for one in self.causes) or Verdict.FAIL in verdicts:
            return Verdict.FAIL
        return Verdict.AMBIGUOUS if Verdict.AMBIGUOUS in verdicts else Verdict.PASS

    def metric(self, name: str, where: str, layer: int | None = None) -> Metric:
        """One number, for example ``kl_mean`` of ``as served``, or ``router_overlap`` of layer 3.

        Raises:
            KeyError: there is none.
        """
        for metric in self.metrics:
            if (metric.name, metric.where, metric.layer) == (name, where, layer):
                return metric
        raise KeyError(f"{name} of {where}" + ("" if layer is None else f", layer {layer}"))

    def to_json(self) -> dict[str, Any]:
        """The record with stable keys; numbers that JSON lacks are ``null`` (NaN) or strings (``inf``)."""
        return {
            "schema": SCHEMA,
            "verdict": self.verdict.value,
            "original": self.original,
            "converted": self.converted,
            "bytes": {"original": self.bytes_original, "converted": self.bytes_converted},
            "text": self.text,
            "tokens": self.tokens,
            "notes": list(self.notes),
            "causes": [_cause(one) for one in self.causes],
            "metrics": [_metric(one) for one in self.metrics],
            "roles": [_role(one) for one in self.roles],
            "identical_tensors": self.identical,
            "tensors": [_tensor(one) for one in self.tensors],
            "curves": [_curve(one) for one in self.curves],
            "experts": [_expert(one) for one in self.experts],
        }

    def to_markdown(self) -> str:
        """Causes first, then the summary, the worst tensors, roles and layers."""
        parts = [
            f"# Parity: {self.verdict.value}",
            f"`{self.converted}` against `{self.original}`: {_size(self.bytes_converted)} of "
            f"{_size(self.bytes_original)}, {self.identical} tensors identical, {len(self.tensors)} not.",
            self._causes(),
            self._summary(),
            *(f"- {note}" for note in self.notes),
            self._worst(),
            self._roles(),
            self._layers(),
        ]
        return "\n\n".join(part for part in parts if part) + "\n"

    def write(self, folder: Path) -> tuple[Path, Path]:
        """Write ``parity.json`` and ``parity.md`` into ``folder``, each whole or not at all; gives their paths.

        Raises:
            OutputError: the folder cannot be made or written.
        """
        try:
            folder.mkdir(parents=True, exist_ok=True)
            text = json.dumps(self.to_json(), indent=1, allow_nan=False, ensure_ascii=False)
            return (
                _replace(folder / JSON_NAME, text + "\n"),
                _replace(folder / MARKDOWN_NAME, self.to_markdown()),
            )
        except OSError as error:
            raise OutputError(f"cannot write the report into {folder}: {error.strerror}") from error

    def _causes(self) -> str:
        if not self.causes:
            return "## Causes\n\nNo fault found in the weights."
        lines = [f"{i}. **{one.severity.value}** {one.kind.value}: {one}" for i, one in enumerate(self.causes, start=1)]
        return "## Causes\n\n" + "\n".join(lines)

    def _summary(self) -> str:
        whole = [one for one in self.metrics if one.layer is None]
        rows = [
            (one.name, one.where, _interval(one), _limit(one), one.verdict.value)
            for where in dict.fromkeys(one.where for one in whole)
            for one in whole
            if one.where == where
        ]
        head = f"## Summary\n\n{self.tokens} tokens, {self.text}.\n\n" if self.tokens else "## Summary\n\n"
        return head + _table(("metric", "where", "value", "limit", "verdict"), rows)

    def _worst(self) -> str:
        rows = [
            (f"`{one.name}`", one.outcome.value, str(one.scheme or ""), _number(one.sums.sqnr_db),
             _number(one.sums.cosine), _number(one.sums.max_error))
            for one in self.tensors[:WORST]
        ]  # fmt: skip
        if not rows:
            return ""
        return "## Worst tensors\n\n" + _table(("tensor", "outcome", "scheme", "SQNR dB", "cosine", "max error"), rows)

    def _roles(self) -> str:
        rows = [
            (one.path, one.scheme, str(one.tensors), str(one.identical), _number(one.sqnr_db), _number(one.worst_db),
             _number(one.cosine), _number(one.max_error))
            for one in self.roles
            if one.identical < one.tensors
        ]  # fmt: skip
        same = ", ".join(one.path for one in self.roles if one.identical == one.tensors)
        table = _table(("role", "scheme", "tensors", "identical", "SQNR dB", "worst dB", "cosine", "max error"), rows)
        return "## Roles\n\n" + (table + "\n\n" if rows else "") + (f"Bit for bit the same: {same}." if same else "")

    def _layers(self) -> str:
        """One table for each number that every layer has, the modes side by side."""
        found = {(one.name, one.where, one.layer): one for one in self.metrics if one.layer is not None}
        parts = []
        for name in dict.fromkeys(name for name, _, _ in found):
            modes = list(dict.fromkeys(where for other, where, _ in found if other == name))
            layers = sorted({layer for other, _, layer in found if other == name and layer is not None})
            rows = [
                (
                    str(layer),
                    *(_interval(found[key]) if (key := (name, mode, layer)) in found else "" for mode in modes),
                )
                for layer in layers
            ]
            parts.append(f"### {name}\n\n" + _table(("layer", *modes), rows))
        return "\n\n".join(("## Layers", *parts)) if parts else ""


def _cause(one: Cause) -> dict[str, Any]:
    return {
        "kind": one.kind.value,
        "severity": one.severity.value,
        "where": one.where,
        "evidence": one.evidence,
        "tensors": list(one.tensors),
    }


def _metric(one: Metric) -> dict[str, Any]:
    return {
        "name": one.name,
        "where": one.where,
        "layer": one.layer,
        "value": _json(one.value),
        "low": _json(one.low),
        "high": _json(one.high),
        "unit": one.unit,
        "limit": None if one.limit is None else _json(one.limit),
        "better": one.better,
        "verdict": one.verdict.value,
    }


def _role(one: RoleSummary) -> dict[str, Any]:
    return {
        "path": one.path,
        "scheme": one.scheme or None,
        "tensors": one.tensors,
        "elements": one.elements,
        "identical": one.identical,
        "sqnr_db": _json(one.sqnr_db),
        "worst_sqnr_db": _json(one.worst_db),
        "worst_tensor": one.worst_name,
        "cosine": _json(one.cosine),
        "max_error": _json(one.max_error),
    }


def _tensor(one: TensorComparison) -> dict[str, Any]:
    return {
        "name": one.name,
        "role": one.role.path,
        "layer": one.role.layer,
        "expert": one.role.expert,
        "outcome": one.outcome.value,
        "scheme": None if one.scheme is None else str(one.scheme),
        "sqnr_db": _json(one.sums.sqnr_db),
        "cosine": _json(one.sums.cosine),
        "max_error": _json(one.sums.max_error),
        "halves": {half.role.part.value: {"sqnr_db": _json(half.sums.sqnr_db)} for half in one.halves},
    }


def _curve(one: Curve) -> dict[str, Any]:
    return {
        "name": one.name,
        "where": one.where,
        "x_label": one.x_label,
        "y_label": one.y_label,
        "points": [[_json(x), _json(y)] for x, y in one.points],
    }


def _expert(one: ExpertUse) -> dict[str, Any]:
    return {"layer": one.layer, "expert": one.expert, "tokens": one.tokens, "sqnr_db": _json(one.sqnr_db)}


def _json(value: float) -> float | str | None:
    if math.isnan(value):
        return None
    return value if math.isfinite(value) else str(value)


def _number(value: float) -> str:
    return f"{value:.4g}" if abs(value) < 1 or abs(value) >= 1000 else f"{value:.4f}".rstrip("0").rstrip(".")


def _interval(one: Metric) -> str:
    value = f"{_number(one.value)} {one.unit}".strip()
    return value if one.low == one.high else f"{value} [{_number(one.low)}, {_number(one.high)}]"


def _limit(one: Metric) -> str:
    if one.limit is None:
        return ""
    return f"{'at most' if one.better == 'low' else 'at least'} {_number(one.limit)}"


def _table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in lines)


def _size(nbytes: int) -> str:
    return f"{nbytes / 1e9:.2f} GB" if nbytes >= 10**9 else f"{nbytes / 1e6:.2f} MB"


def _replace(path: Path, text: str) -> Path:
    """Write beside ``path`` and rename over it: readers see the old file or the new one."""
    beside = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        beside.write_text(text, encoding="utf-8")
        beside.replace(path)
    finally:
        beside.unlink(missing_ok=True)
    return path
