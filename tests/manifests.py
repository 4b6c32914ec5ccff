"""Manifests written anew, with a seal that fits: what somebody who knows the format could do."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from qconvert.io.hashing import ALGORITHMS, XXH3, new_hash
from qconvert.manifest import seal_line


def edit_manifest(folder: Path, change: Callable[[dict[str, Any]], object]) -> None:
    """Change the document in place and seal it again."""
    document = json.loads((folder / "manifest.json").read_text())
    change(document)
    write_manifest(folder, document)


def write_manifest(folder: Path, document: dict[str, Any]) -> None:
    """Lay the document out as a manifest is, and seal it."""
    head = {key: value for key, value in document.items() if key not in ("tensors", "seal")}
    tensors = document["tensors"]
    lines = ",\n".join(f"  {json.dumps(name)}: {json.dumps(entry)}" for name, entry in tensors.items())
    raw = (json.dumps(head, indent=1)[:-2] + f',\n "tensors": {{\n{lines}\n }},\n').encode()
    algorithm = head.get("hash")
    seal = new_hash(algorithm if algorithm in ALGORITHMS else XXH3)
    seal.update(memoryview(raw))
    (folder / "manifest.json").write_bytes(raw + seal_line(seal.hexdigest()))
