"""What a user types, parsed: sizes, hashes and options that several commands share."""

from __future__ import annotations

import os
import re
from typing import Annotated

import typer

from qconvert.core.errors import UsageError
from qconvert.io.hashing import SHA256, XXH3

_UNITS = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}

Json = Annotated[bool, typer.Option("--json", help="Print one JSON document instead of tables.")]

Device = Annotated[
    str, typer.Option(help="Where matrices are rounded: cpu, cuda, or cuda:1 of several. Not run on a GPU yet.")
]

HASHES = {"xxh3-128": XXH3, "sha256": SHA256}

DryRun = Annotated[bool, typer.Option("--dry-run", help="Print the plan and write nothing.")]

PROCESSORS = min(os.cpu_count() or 1, 8)

Jobs = Annotated[int, typer.Option(min=1, help="Steps that run at once; the bytes do not depend on it.")]

MaxMemory = Annotated[str, typer.Option(help="What the whole process may hold, such as 4GiB.")]

Fresh = Annotated[bool, typer.Option("--fresh", help="Start over instead of going on from what an earlier run left.")]

ReadBack = Annotated[
    bool,
    typer.Option(
        "--read-back/--no-read-back",
        help="Read every byte back from the disk and compare it before OUT appears: the disk moves twice as much. "
        "`qconvert verify` does the same at any time.",
    ),
]

MaxShardSize = Annotated[str, typer.Option(help="Largest output file.")]

HashName = Annotated[str, typer.Option("--hash", help=f"Of tensors and files in manifest.json: {' or '.join(HASHES)}.")]

FOLD_ENGINE = "onnxruntime"

FoldEngine = Annotated[
    str | None, typer.Option("--engine", help=f"Who shall run a folded shared expert: {FOLD_ENGINE}, and nobody else.")
]


QuantizeEngine = Annotated[
    str | None,
    typer.Option(
        "--engine",
        help=f"Who alone shall read the output: {FOLD_ENGINE} a folded shared expert; vllm what a budget decides, "
        "which then may give each layer's experts a scheme of their own.",
    ),
]


def check_fold_engine(engine: str | None) -> None:
    """Refuse to fold for an engine that does not run it.

    Raises:
        UsageError: no engine is named, or another one.
    """
    if engine == FOLD_ENGINE:
        return
    found = "no engine is named" if engine is None else f"{engine!r} is named"
    raise UsageError(
        "transformers, vLLM and SGLang read the shared expert by its own name, and SGLang fuses it by itself when it "
        "loads: a folded checkpoint is for `qconvert export-onnx` and other graphs of ONNX Runtime with one kernel for "
        f"all experts, but {found}. If that is what you want, give --engine {FOLD_ENGINE}"
    )


def parse_hash(name: str) -> str:
    """The algorithm that ``--hash`` names.

    Raises:
        UsageError: an unknown name.
    """
    if name not in HASHES:
        raise UsageError(f"hash {name!r} is unknown; expected {' or '.join(HASHES)}")
    return HASHES[name]


def parse_size(text: str) -> int:
    """Bytes of a text like ``4GiB``, ``500 MB`` or ``1000000``.

    Raises:
        UsageError: it is none.
    """
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([A-Za-z]*)\s*", text)
    if match is None or match[2].upper() not in _UNITS:
        raise UsageError(f"size {text!r} is not understood; write for example 4GiB, 500MB or a number of bytes")
    size = int(float(match[1]) * _UNITS[match[2].upper()])
    if size <= 0:
        raise UsageError(f"size {text!r} is not positive")
    return size


_SECONDS = {"": 1, "S": 1, "M": 60, "MIN": 60, "H": 3600}


def parse_duration(text: str) -> float:
    """Seconds of a text like ``30m``, ``2h`` or ``90``.

    Raises:
        UsageError: it is none.
    """
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([A-Za-z]*)\s*", text)
    if match is None or match[2].upper() not in _SECONDS:
        raise UsageError(f"time {text!r} is not understood; write for example 30m, 2h or a number of seconds")
    return float(match[1]) * _SECONDS[match[2].upper()]
