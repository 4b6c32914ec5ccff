"""`qconvert demo`: the whole path on the small trained checkpoint that comes along."""

from __future__ import annotations

import json as json_module
import os
import shutil
import time
from pathlib import Path
from typing import Annotated

import typer

import reference_model
from qconvert.cli import console
from qconvert.cli.options import Json
from qconvert.cli.parity import EXIT_CODES
from qconvert.convert import convert
from qconvert.core.errors import OutputError
from qconvert.core.metric import Metric
from qconvert.io.checkpoint import Checkpoint
from qconvert.manifest import MANIFEST_FILE
from qconvert.parity.limits import DEFAULT, named_limits
from qconvert.parity.outputs.document import as_document
from qconvert.parity.outputs.folder import write_report
from qconvert.parity.report import ParityReport
from qconvert.parity.run import ParityOptions, compare
from qconvert.plan.policy import SCHEME_NAMES, default_policy, scheme_named

CHECKPOINT = Path(reference_model.__file__).parent / "demo"


def demo(
    out: Annotated[Path, typer.Option(help="Folder for the converted checkpoint and the report.")] = Path(
        "demo-output"
    ),
    scheme: Annotated[str, typer.Option(help=f"One of {', '.join(SCHEME_NAMES)}.")] = "int4",
    group: Annotated[int | None, typer.Option(help="Inputs that share an int4 scale: 32, 64 or 128.")] = None,
    json: Json = False,
) -> None:
    """Convert the demo checkpoint, compare it with the original on held-out text, and show what it cost.

    Example:
      qconvert demo --scheme int4 --group 32
    """

    def call() -> int:
        policy = default_policy(scheme_named(scheme, group=group))
        target, report_folder = out / scheme, out / f"{scheme}-report"
        _make_room(target)
        start = time.perf_counter()
        done = convert(CHECKPOINT, target, policy, jobs=min(os.cpu_count() or 1, 8))
        seconds = time.perf_counter() - start
        with console.progress(in_bytes=False, quiet=json) as advance:
            report = compare(CHECKPOINT, target, ParityOptions(limits=named_limits(DEFAULT)), advance)
        paths = write_report(report, report_folder)
        if json:
            console.show_json(as_document(report))
        else:
            table = console.plain_table("demo checkpoint", f">{scheme}")
            for name, value in (
                ("size before", console.gigabytes(done.bytes_before)),
                ("size after", console.gigabytes(done.bytes_after)),
                ("converted in", f"{seconds:.1f} s"),
                *_numbers(report),
                ("verdict", report.verdict.value),
            ):
                table.add_row(name, value)
            console.show(table)
            console.say(report.because)
            console.say(f"checkpoint: {target}")
            for path in paths:
                console.say(f"report:     {path}")
        return EXIT_CODES[report.verdict]

    raise typer.Exit(console.guarded(call))


def _numbers(report: ParityReport) -> list[tuple[str, str]]:
    def value(name: str) -> Metric:
        return report.metric(name, "as served")

    kl, top1 = value("kl_mean"), value("top1_agreement")
    return [
        ("held-out tokens", f"{report.tokens:,}"),
        ("KL(original || converted)", f"{kl.value:.4f} nats ({kl.low:.4f} to {kl.high:.4f})"),
        ("same most likely token", f"{top1.value:.2%}"),
        (
            "perplexity",
            f"{value('perplexity_original').value:.3f} -> {value('perplexity_converted').value:.3f}",
        ),
    ]


def _make_room(target: Path) -> None:
    """Remove the output of an earlier demo; anything else is left alone."""
    if not target.exists():
        return
    with Checkpoint.open(CHECKPOINT) as checkpoint:
        of_the_demo = checkpoint.config_hash
    try:
        record = json_module.loads((target / MANIFEST_FILE).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        record = {}
    if not isinstance(record, dict) or record.get("config_hash") != of_the_demo:
        raise OutputError(f"{target} exists and is no output of an earlier demo: choose another --out")
    try:
        shutil.rmtree(target)
    except OSError as error:
        raise OutputError(f"cannot remove the earlier demo {target}: {error.strerror}") from error
