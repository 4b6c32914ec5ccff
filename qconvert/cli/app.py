"""`qconvert`: parse, call, print."""

from __future__ import annotations

from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from qconvert import __version__
from qconvert.cli.calibrate import calibrate
from qconvert.cli.check import check
from qconvert.cli.convert import convert
from qconvert.cli.demo import demo
from qconvert.cli.export_onnx import export_onnx
from qconvert.cli.fold import fold, unfold
from qconvert.cli.inspect import inspect
from qconvert.cli.parity import parity
from qconvert.cli.parity_diff import parity_diff
from qconvert.cli.quantize import quantize
from qconvert.cli.run import run
from qconvert.cli.verify import verify

EXIT_CODES = """Exit codes: 0 done; 1 a parity limit is exceeded, a fault was found or a report became worse;
2 wrong options; 3 the source is damaged or not supported; 4 the conversion is impossible as asked;
5 the output cannot be written; 6 weights are NaN or infinite;
7 a parity limit lies inside its number's confidence interval; 70 a fault of qconvert itself; 130 interrupted;
141 nobody reads what is printed any more."""


class Commands(TyperGroup):
    """Commands of one word or of two, so that ``parity`` takes folders and ``parity diff`` reports."""

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        """The command that ``args`` begin with, and what is left of them."""
        name = " ".join(args[:2])
        return (name, self.commands[name], args[2:]) if name in self.commands else super().resolve_command(ctx, args)


app = typer.Typer(
    cls=Commands,
    name="qconvert",
    help="Convert and quantize Qwen3.5-MoE checkpoints of any size, and prove what the conversion cost.",
    epilog=EXIT_CODES,
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
)

for command in (inspect, calibrate, quantize, convert, fold, unfold, export_onnx, run, verify, check, parity, demo):
    app.command()(command)
app.command("parity diff")(parity_diff)


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
