"""All formats."""

from __future__ import annotations

from qconvert.core.errors import FormatError
from qconvert.core.scheme import Block, Channel, Float, Int, Scheme
from qconvert.core.scheme import Scheme
from qconvert.formats.base import Format
from qconvert.formats.float_quantized import FloatQuantized
from qconvert.formats.fp8_block import Fp8Block
from qconvert.formats.pack_quantized import PackQuantized

FORMATS: tuple[Format, ...] = (PackQuantized(), FloatQuantized(), Fp8Block())


def format_named(name: str) -> Format:
    """The format that plans call ``name``.

    Raises:
        FormatError: there is none.
    """
    for known in FORMATS:
        if known.name == name:
            return known
    raise FormatError(f"no format is called {name!r}; there are {', '.join(known.name for known in FORMATS)}")


def format_for(scheme: Scheme) -> Format:
    """The format that a scheme is written in unless another one is asked for.

    Raises:
        FormatError: no format holds the scheme.
    """
    match scheme.grid, scheme.blocking:
        case Int(), _:
            return format_named("pack-quantized")
        case Float(kind="e4m3fn"), Channel():
            return format_named("float-quantized")
        case Float(kind="e4m3fn"), Block():
            return format_named("fp8-block")
    raise FormatError(f"no format holds {scheme}")


def format_for(scheme: Scheme) -> Format:
    """The first format that holds ``scheme``.

    Raises:
        FormatError: none does, with the reason of each.
    """
    reasons = []
    for known in FORMATS:
        try:
            known.check_scheme(scheme)
        except FormatError as reason:
            reasons.append(str(reason))
        else:
            return known
    raise FormatError(f"no format holds {scheme}: {'; '.join(reasons)}")
