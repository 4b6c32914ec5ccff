"""`qconvert`: parse, call, print."""

from __future__ import annotations

from typing import Annotated

import typer

from qconvert import __version__
from qconvert.cli.commands import MARKUP, Commands

EXIT_CODES = """Exit codes: 0 done; 1 a parity limit is exceeded, a fault was found or a report became worse;
2 wrong options; 3 the source is damaged or not supported; 4 the conversion is impossible as asked;
5 the output cannot be written; 6 weights are NaN or infinite;
7 a parity limit lies inside its number's confidence interval; 70 a fault of qconvert itself; 130 interrupted;
141 nobody reads what is printed any more."""


app = typer.Typer(
    cls=Commands,
    name="qconvert",
    help="Convert and quantize Qwen3.5-MoE checkpoints of any size, and prove what the conversion cost.",
    epilog=EXIT_CODES,
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=MARKUP,
)


def _version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"qconvert {__version__}")
        raise typer.Exit


@app.callback()
def options(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    """Options of all commands."""
