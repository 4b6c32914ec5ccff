"""`qconvert calibrate`: what the inputs of every matrix are like, for rounding that spares the important ones."""

from __future__ import annotations

import shlex
import time
from pathlib import Path
from typing import Annotated, Any

import typer

from calibration.capture import PICTURE, capture
from calibration.coverage import warnings
from calibration.data import CalibrationWindows, calibration_windows
from qconvert.cli import console
from qconvert.cli.options import PROCESSORS, Fresh, Jobs, Json, parse_size
from qconvert.core.coverage import FEW, Coverage
from qconvert.io.hub import resolve
from qconvert.memory import available_bytes, resident_bytes, working_memory
from qconvert.texts.documents import Text
from qconvert.weights.source import CheckpointWeights

TOKENS, WINDOW = 65_536, 512

_SHOWN_LAYERS = 8

CalibrationText = Annotated[
    list[str] | None,
    typer.Option(
        metavar="[NAME=]FILE",
        help="What is read, again for each domain: text, .jsonl (messages for the chat template, text or token_ids a "
        "line) or .npy (token ids). Default: the texts that come along.",
    ),
]
Tokens = Annotated[int, typer.Option(min=2, help="Tokens in all windows, domains in equal shares.")]
Window = Annotated[int, typer.Option(min=2, help="Tokens that see each other.")]
Seed = Annotated[int, typer.Option(help="Draws the windows of each domain.")]


def calibrate(
    source: Annotated[str, typer.Argument(metavar="SRC", help="Folder of a checkpoint, or a hub id ORG/NAME.")],
    out: Annotated[
        Path, typer.Option("--out", "-o", metavar="STATS", help="New folder; it appears whole or not at all.")
    ],
    text: CalibrationText = None,
    tokens: Tokens = TOKENS,
    window: Window = WINDOW,
    seed: Seed = 0,
    jobs: Jobs = PROCESSORS,
    max_memory: Annotated[
        str | None,
        typer.Option(help="What the whole process may hold, such as 8GiB. Default: half of what is available."),
    ] = None,
    fresh: Fresh = False,
    json: Json = False,
) -> None:
    """Run a checkpoint over text, layer by layer, and keep what the inputs of each matrix are like.

    STATS holds, of every matrix and every expert apart, how many tokens came and the mean and largest of each input;
    and which experts were visited together. `qconvert quantize --method imatrix` rounds by it, in any scheme. Layers
    are in memory one at a time; a run that was killed goes on from the last layer when the same command is given
    again. Experts that few tokens reach are named, with what to do.

    Examples:
      qconvert calibrate ./Qwen3.5-35B-A3B -o ./stats

      qconvert calibrate ./Qwen3.5-35B-A3B -o ./stats --text code=src.txt --text chat=talks.jsonl --tokens 262144

      qconvert quantize ./Qwen3.5-35B-A3B ./int4 --method imatrix --stats ./stats
    """

    def call() -> int:
        limit = resident_bytes() + available_bytes() // 2 if max_memory is None else parse_size(max_memory)
        folder = resolve(source)
        start = time.perf_counter()
        with CheckpointWeights.open(folder) as weights:
            vocabulary = weights.config.text.vocab_size
        texts = tuple(Text.parse(one) for one in text or ())
        windows = calibration_windows(folder, vocabulary, texts=texts, tokens=tokens, window=window, seed=seed)
        with console.progress(in_bytes=False, quiet=json) as advance:
            coverage = capture(
                folder, out, windows, jobs=jobs, memory=working_memory(limit), fresh=fresh, progress=advance
            )
        seconds = time.perf_counter() - start
        if json:
            console.show_json(_document(out, windows, coverage, seconds))
        else:
            _show(folder, out, windows, coverage, seconds)
        return 0

    raise typer.Exit(console.guarded(call))


def _notes(windows: CalibrationWindows) -> tuple[str, ...]:
    """What windows lack of what was asked for."""
    asked, found = windows.record["tokens_asked"], windows.tokens
    if asked - found < windows.record["window"]:
        return ()
    return (f"the texts hold {found:,} tokens in whole windows, {asked:,} were asked for: give more text with --text",)


def _document(out: Path, windows: CalibrationWindows, coverage: Coverage, seconds: float) -> dict[str, Any]:
    return {
        "out": str(out),
        "seconds": round(seconds, 3),
        "windows": windows.record,
        "coverage": [layer.entry() for layer in coverage.layers],
        "warnings": [*_notes(windows), *warnings(coverage)],
    }


def _show(source: Path, out: Path, windows: CalibrationWindows, coverage: Coverage, seconds: float) -> None:
    domains = ", ".join(f"{name} {one['tokens']:,}" for name, one in windows.record["domains"].items())
    console.say(f"{windows.tokens:,} tokens in windows of {windows.record['window']}: {domains}")
    show_coverage(coverage)
    for warning in (*_notes(windows), *warnings(coverage)):
        console.say(f"warning: {warning}", style="yellow")
    console.say(f"in {seconds:.1f} s: {out}, with {PICTURE} in it")
    command = ["qconvert", "quantize", str(source), "OUT", "--method", "imatrix", "--stats", str(out)]
    console.say(f"Next: {shlex.join(command)}")


def show_coverage(coverage: Coverage) -> None:
    """The layers whose experts got the fewest tokens, and all layers together."""
    table = console.plain_table("experts of", ">fewest", ">median", ">most", ">none", f">below {FEW}", ">below inputs")
    order = sorted(coverage.layers, key=lambda layer: (layer.least, layer.median))
    for layer in order[:_SHOWN_LAYERS]:
        table.add_row(
            layer.name, f"{layer.least:,}", f"{layer.median:,}", f"{layer.most:,}", f"{len(layer.unreached):,}",
            f"{layer.few:,}", f"{layer.fewer_than_inputs:,}",
        )  # fmt: skip
    if len(order) > _SHOWN_LAYERS:
        table.add_row(f"{len(order) - _SHOWN_LAYERS} layers better off", *[""] * 6)
    table.add_row(
        "all layers", "", "", "", f"{coverage.unreached:,}", f"{coverage.few:,}", f"{coverage.fewer_than_inputs:,}",
        end_section=True,
    )  # fmt: skip
    console.show(table)
