"""The console script: light on its feet before the commands are there and after they are done."""

from __future__ import annotations

import gc
import os
import sys
from contextlib import suppress
from typing import NoReturn


def main() -> None:
    """Run the command line and end the process.

    Everything is closed when a command returns. Taking torch apart object by object would cost most of a second more,
    and whoever interrupts would wait for it.
    """
    gc.disable()  # imports make some 300,000 objects that live for ever; looking through them again and again is vain
    try:
        from qconvert.cli.app import app
        from qconvert.cli.commands import load, name_in

        if (name := name_in(sys.argv[1:])) is not None:
            load(name)
        gc.freeze()
        gc.enable()
        app()
    except KeyboardInterrupt:  # before there was a command that could say so
        with suppress(OSError):
            os.write(2, b"\nInterrupted: no output has appeared.\n")
        _end(130)
    except SystemExit as end:
        _end(end.code if isinstance(end.code, int) else int(end.code is not None))


def _end(code: int) -> NoReturn:
    for stream in (sys.stdout, sys.stderr):
        with suppress(OSError):  # the command has complained of it
            if stream is not None:  # closed by whoever started us
                stream.flush()
    os._exit(code)
