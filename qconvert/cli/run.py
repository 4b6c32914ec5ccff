"""`qconvert run`: a prompt through a package."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Annotated

import typer

from qconvert.cli import console
from qconvert.cli.options import Json


def run(
    package: Annotated[Path, typer.Argument(metavar="PACKAGE", help="Folder that `qconvert export-onnx` wrote.")],
    prompt: Annotated[str, typer.Argument(help="Text to go on from.")],
    max_tokens: Annotated[int, typer.Option(min=1, help="Tokens to generate at most.")] = 64,
    threads: Annotated[int, typer.Option(min=0, help="Of ONNX Runtime; 0 is one for each processor.")] = 0,
    draft: Annotated[
        bool, typer.Option("--draft", help="Let the prediction head guess ahead: the same text, in fewer calls.")
    ] = False,
    json: Json = False,
) -> None:
    """Generate text with an ONNX package, greedily, and say how fast it was.

    Examples:
      qconvert run ./package "The river runs" --max-tokens 32

      qconvert run ./package "The river runs" --draft
    """

    def call() -> int:
        # Here, because ONNX Runtime is needed by no other command.
        from qconvert.onnx_export.generate import generate, read_tokenizer
        from qconvert.onnx_export.runtime import Package

        start = time.perf_counter()
        model = Package(package, threads=threads)
        loaded = time.perf_counter()
        tokenizer = read_tokenizer(package)
        with console.progress(in_bytes=False, quiet=json) as advance:
            result = generate(
                model,
                tokenizer.encode(prompt).ids,
                max_tokens=max_tokens,
                draft=draft,
                progress=lambda now: advance("generating", now, max_tokens),
            )
        told = {
            "prompt_tokens": result.prompt_tokens,
            "generated_tokens": len(result.tokens),
            "load_seconds": round(loaded - start, 3),
            "prefill_tokens_per_second": round(result.prefill_rate, 2),
            "decode_tokens_per_second": None if result.decode_rate is None else round(result.decode_rate, 2),
        }
        if draft:
            told |= {"drafted": result.drafted, "accepted": result.accepted}
        text = tokenizer.decode(result.tokens)
        if json:
            console.show_json({"text": text, "tokens": result.tokens, **told})
            return 0
        console.say(f"{prompt}{text}")
        decode = "" if result.decode_rate is None else f", decode {result.decode_rate:.1f} tokens/s"
        console.say(
            f"{result.prompt_tokens} tokens in: {result.prefill_rate:.1f} tokens/s; {len(result.tokens)} out{decode}; "
            f"loaded in {loaded - start:.1f} s"
            + (f"; {result.accepted} of {result.drafted} guesses right" if draft else ""),
            style="dim",
        )
        return 0

    raise typer.Exit(console.guarded(call))
