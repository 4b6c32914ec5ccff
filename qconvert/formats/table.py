"""All formats."""

from __future__ import annotations

from qconvert.core.errors import FormatError
from qconvert.core.scheme import Scheme
from qconvert.formats.base import Format
from qconvert.formats.float_quantized import FloatQuantized
from qconvert.formats.fp8_block import Fp8Block
from qconvert.formats.int_quantized import IntQuantized
from qconvert.formats.mxfp4_packed import Mxfp4Packed
from qconvert.formats.pack_quantized import PackQuantized

FORMATS: tuple[Format, ...] = (PackQuantized(), IntQuantized(), FloatQuantized(), Fp8Block(), Mxfp4Packed())


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
