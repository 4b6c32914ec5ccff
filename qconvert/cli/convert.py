"""`qconvert convert`: a quantized checkpoint in another loader's format, not rounded."""

from __future__ import annotations

import shlex
import time
from pathlib import Path
from typing import Annotated

import typer

from qconvert.carry_out import Conversion
from qconvert.cli import console
from qconvert.cli.options import (
    PROCESSORS,
    DryRun,
    Fresh,
    HashName,
    Jobs,
    Json,
    MaxMemory,
    MaxShardSize,
    ReadBack,
    parse_hash,
    parse_size,
)
from qconvert.cli.planned import limits, preview, show_plan
from qconvert.convert import move_codes, plan_codes
from qconvert.formats.table import METHODS
from qconvert.io.hub import resolve
from qconvert.plan.reencoding import Reencoding


def convert(
    source: Annotated[
        str, typer.Argument(metavar="SRC", help="Folder of a quantized checkpoint, or a hub id ORG/NAME.")
    ],
    out: Annotated[Path, typer.Argument(metavar="OUT", help="New folder; it appears whole or not at all.")],
    method: Annotated[str, typer.Option("--format", help=f"The loader that shall read it: {', '.join(METHODS)}.")],
    allow_scale_rounding: Annotated[
        bool,
        typer.Option(
            "--allow-scale-rounding", help="Round scales that the loader cannot hold exactly, and report the error."
        ),
    ] = False,
    dry_run: DryRun = False,
    jobs: Jobs = PROCESSORS,
    max_memory: MaxMemory = "1GiB",
    fresh: Fresh = False,
    read_back: ReadBack = True,
    max_shard_size: MaxShardSize = "5GB",
    algorithm: HashName = "xxh3-128",
    json: Json = False,
) -> None:
    """Move a quantized checkpoint into another loader's format without rounding.

    Codes, zero points and scales stay what they are: every matrix means exactly the same numbers, also after the
    loader has cast its scales (to the type of the model for int4 and int8). What is not quantized is copied. Pairs
    with another grid, other blocks, zero points that the format has no room for or inputs in activation order are
    refused before anything is written, and so are scales that the loader does not hold exactly; for the former there
    is `qconvert quantize --from-quantized`, for the latter --allow-scale-rounding.

    Examples:
      qconvert convert ./int4 ./gptq --format gptq

      qconvert convert ./Qwen3.5-35B-A3B-GPTQ-Int4 ./int4 --format compressed-tensors --allow-scale-rounding
    """

    def call() -> int:
        asked = Reencoding(method=method, allow_scale_rounding=allow_scale_rounding)
        limit, shard_bytes, hashes = parse_size(max_memory), parse_size(max_shard_size), parse_hash(algorithm)
        folder = resolve(source)
        if dry_run:
            plan = plan_codes(folder, asked, max_memory=limit, shard_bytes=shard_bytes)
            preview(plan, out, json=json)
            return 0
        start = time.perf_counter()
        with console.progress(in_bytes=True, quiet=json) as advance:
            done = move_codes(
                folder, out, asked, jobs=jobs, max_memory=limit, shard_bytes=shard_bytes,
                fresh=fresh, read_back=read_back,
                algorithm=hashes, progress=lambda now, total: advance("moving", now, total),
            )  # fmt: skip
        _report(done, folder, time.perf_counter() - start, json=json)
        return 0

    raise typer.Exit(console.guarded(call))


def _report(done: Conversion, source: Path, seconds: float, *, json: bool) -> None:
    if json:
        told = ("source_hash", "policy_hash", "decisions", "source_quantization", "reencoding", "scale_error")
        console.show_json(
            {
                "out": str(done.out),
                "bytes_before": done.bytes_before,
                "bytes_after": done.bytes_after,
                "seconds": round(seconds, 3),
                **{key: done.record[key] for key in told},
                "engine_limits": limits(done.plan),
            }
        )
        return
    show_plan(done.plan)
    for path, error in done.record["scale_error"].items():
        console.say(f"{path}: scales {f'rounded, largest relative error {error:.2g}' if error else 'exact'}")
    sizes = f"{console.gigabytes(done.bytes_before)} -> {console.gigabytes(done.bytes_after)}"
    console.say(f"{sizes} in {seconds:.1f} s: {done.out}")
    console.say(f"Next: {shlex.join(['qconvert', 'parity', str(source), str(done.out)])}")
