"""What tests with real engines have shown of each format, for the table in docs/formats.md.

``pytest --proofs docs/formats.json`` adds what its tests prove to the file, ``python docs/make_formats.py`` writes the
table. A test reaches ``prove`` only after its assertions.
"""

from __future__ import annotations

import datetime
import json
from pathlib import Path
from typing import Any, Literal

Result = Literal["right", "loads right", "refused", "wrong"]
"""``loads right``: the engine's kernels were replaced, see tests/engines/vllm_shim. ``right`` says that and more."""

Proofs = dict[str, dict[str, dict[str, dict[str, str]]]]
"""How it was written -> experts or linears -> engine -> result, version, date, test."""


def add(proofs: Proofs, *, written: str, what: str, engine: str, version: str, result: Result, test: str) -> None:
    """Note one result; two tests that contradict each other are an error.

    Raises:
        ValueError: they do.
    """
    engines = proofs.setdefault(written, {}).setdefault(what, {})
    known = engines.get(engine)
    if known is not None and {known["result"], result} not in ({result}, {"right", "loads right"}):
        raise ValueError(f"{written}, {what}, {engine}: {test} says {result}, {known['test']} says {known['result']}")
    today = datetime.date.today().isoformat()
    engines[engine] = _more(known, {"result": result, "version": version, "date": today, "test": test})


def _more(known: dict[str, str] | None, found: dict[str, str]) -> dict[str, str]:
    """What says more of one version: that kernels compute right, and not only that weights are loaded right."""
    same = known is not None and known["version"] == found["version"]
    if known is not None and same and (known["result"], found["result"]) == ("right", "loads right"):
        return known
    return found


def merge(path: Path, found: Proofs) -> None:
    """Put what was found into the file, in place of what it says of the same."""
    proofs: Any = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    for written, whats in found.items():
        for what, engines in whats.items():
            stored = proofs.setdefault(written, {}).setdefault(what, {})
            stored.update({engine: _more(stored.get(engine), proof) for engine, proof in engines.items()})
    path.write_text(json.dumps(proofs, indent=1, sort_keys=True) + "\n", encoding="utf-8")
