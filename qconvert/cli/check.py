"""`qconvert check`: will engines load a written checkpoint as it is meant?"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from qconvert.cli import console
from qconvert.cli.options import Json
from qconvert.engine_check.rule import Effect, Engine
from qconvert.engine_check.run import EngineCheck, check_checkpoint, describe

FAULTY = 1

_STYLES = {
    Effect.FAILS: "red",
    Effect.WRONG: "bold red",
    Effect.DRAFT_FAILS: "red",
    Effect.DRAFT_WRONG: "bold red",
    Effect.NOTE: "yellow",
}


def check(
    out: Annotated[Path, typer.Argument(metavar="OUT", help="Folder of a checkpoint, whoever wrote it.")],
    engine: Annotated[
        list[Engine] | None, typer.Option(help="Only the rules of this engine; may be given again; default: all.")
    ] = None,
    tp: Annotated[int, typer.Option("--tp", min=1, help="Ranks that the model is to be split among.")] = 1,
    json: Json = False,
) -> None:
    """Apply the loading rules of vLLM, transformers and SGLang to a checkpoint: names, schemes, sizes, completeness.

    Reads headers and config.json alone, no weights. Every violation is named at once, with the modules, what the
    engine does there and what to do; what concerns the MTP head alone is told as a fault of drafts. A rule that was
    read in an engine's source and not run says so. Exit code 1 when an engine would not load the checkpoint or load
    it wrongly, 3 when it cannot be read at all.

    Examples:
      qconvert check ./int4

      qconvert check ./Qwen3.5-35B-A3B-FP8 --engine vllm --tp 4 --json
    """

    def call() -> int:
        found = check_checkpoint(out, tuple(engine or Engine), tp=tp)
        if json:
            console.show_json(found.to_json())
        else:
            _show(found)
        return FAULTY if found.faults else 0

    raise typer.Exit(console.guarded(call))


def _show(found: EngineCheck) -> None:
    for one in found.found:
        console.say(f"{one.effect.value}: {describe(one)}", style=_STYLES[one.effect])
    engines = ", ".join(map(str, found.engines))
    ranks = "" if found.tp == 1 else f", {found.tp} ranks"
    verdict = f"faults: {len(found.faults):,}" if found.faults else "no fault"
    console.say(
        f"{found.out}: {found.rules} rules of {engines}{ranks}: {verdict}",
        style="bold red" if found.faults else "bold green",
    )
