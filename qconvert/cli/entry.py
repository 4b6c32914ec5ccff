"""The console script: light on its feet before the commands are there and after they are done."""

from __future__ import annotations

import gc
import os
import sys
from contextlib import suppress


def main() -> None:
    """Run the command line and end the process.

    Everything is closed when a command returns. Taking torch apart object by object would cost most of a second more,
    and whoever interrupts would wait for it.
    """
    gc.disable()  # imports make some 300,000 objects that live for ever; looking through them again and again is vain
    from qconvert.cli.app import app

    gc.freeze()
    gc.enable()
    try:
        app()
    except SystemExit as end:
        with suppress(BrokenPipeError):
            sys.stdout.flush()
        with suppress(BrokenPipeError):
            sys.stderr.flush()
        os._exit(end.code if isinstance(end.code, int) else end.code is not None)
