"""`qconvert verify`: is a converted checkpoint what its manifest says?"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated

import typer

from qconvert.cli import console
from qconvert.cli.calibrated import CalibrationData, again_by
from qconvert.cli.options import Device, Json, parse_size
from qconvert.cli.statistics import Stats, statistics_of
from qconvert.core.errors import UsageError
from qconvert.device import device_named
from qconvert.io.hub import resolve
from qconvert.verify import Verification
from qconvert.verify import verify as verify_folder

FAULTY = 1


def verify(
    out: Annotated[Path, typer.Argument(metavar="OUT", help="Folder that `qconvert quantize` or `convert` made.")],
    deep: Annotated[
        str | None,
        typer.Option("--deep", metavar="SRC", help="Convert SRC again without writing and compare every byte."),
    ] = None,
    stats: Stats = None,
    calibration_data: CalibrationData = None,
    jobs: Annotated[int, typer.Option(min=1, help="Steps of --deep that run at once.")] = min(os.cpu_count() or 1, 8),
    max_memory: Annotated[
        str | None,
        typer.Option(
            help="What the whole process may hold, such as 4GiB. Default: 1GiB, with --calibration-data 3GiB."
        ),
    ] = None,
    device: Device = "cpu",
    json: Json = False,
) -> None:
    """Read every byte of a converted checkpoint and compare it with the hashes in its manifest.json.

    All faults are named, file by file and tensor by tensor: other bytes, types or shapes, what is missing and what
    does not belong there. The manifest vouches for what was written; --deep shows that it is what SRC gives. Exit
    code 1 when there is a fault, 3 when the manifest is missing or damaged.

    Examples:
      qconvert verify ./int4

      qconvert verify ./int4 --deep ./Qwen3.5-35B-A3B --json

      qconvert verify ./int4 --deep ./Qwen3.5-35B-A3B --stats ./stats

      qconvert verify ./gptq --deep ./Qwen3.5-35B-A3B --calibration-data default
    """

    def call() -> int:
        limit = parse_size(max_memory or ("3GiB" if calibration_data else "1GiB"))
        place = device_named(device)
        if (stats is not None or calibration_data) and deep is None:
            raise UsageError("--stats and --calibration-data are for --deep, which rounds again")
        if stats is not None and calibration_data:
            raise UsageError("a checkpoint is rounded by --stats or by --calibration-data, not by both")
        source = None if deep is None else resolve(deep)
        with (
            statistics_of(stats, source or out) as (statistics, _),
            console.progress(in_bytes=True, quiet=json) as advance,
        ):
            by = again_by(out, source, calibration_data) if source is not None and calibration_data else statistics
            found = verify_folder(out, source, jobs=jobs, max_memory=limit, device=place, by=by, progress=advance)
        if json:
            console.show_json(found.to_json())
        else:
            _show(found)
        return FAULTY if found.faults else 0

    raise typer.Exit(console.guarded(call))


def _show(found: Verification) -> None:
    for fault in found.faults:
        console.say(str(fault), style="red")
    if found.faults:
        for note in found.notes:
            console.say(f"note: {note}", style="yellow")
    against = "its manifest" if found.source is None else f"its manifest and {found.source}"
    verdict = f"faults: {len(found.faults):,}" if found.faults else "no fault"
    size = console.gigabytes(found.nbytes)
    console.say(
        f"{found.out}: {found.tensors:,} tensors, {size}, compared with {against}: {verdict}",
        style="bold red" if found.faults else "bold green",
    )
