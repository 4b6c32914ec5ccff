"""All formats."""

from __future__ import annotations

from dataclasses import replace
from math import prod

from qconvert.core.dtypes import DType
from qconvert.core.errors import FormatError
from qconvert.core.scheme import Scheme
from qconvert.formats.awq import Awq
from qconvert.formats.base import Format
from qconvert.formats.bitsandbytes_state import Bitsandbytes4, Bitsandbytes8
from qconvert.formats.float_quantized import FloatQuantized
from qconvert.formats.fp8_block import Fp8Block
from qconvert.formats.fp8_modelopt import MODELOPT_FLAT_TILES, MODELOPT_ROWS, MODELOPT_TILES
from qconvert.formats.fp8_tensor import MODELOPT_FP8, TENSOR_SCALED
from qconvert.formats.gptq import AUTO_ROUND, AUTO_ROUND_GPTQ, GPTQ_V2, Gptq
from qconvert.formats.int_quantized import IntQuantized
from qconvert.formats.matmul_nbits import MatMulNBits
from qconvert.formats.mxfp4_packed import Mxfp4Packed
from qconvert.formats.nvfp4_modelopt import Nvfp4ModelOpt
from qconvert.formats.nvfp4_packed import Nvfp4Packed
from qconvert.formats.pack_quantized import REORDERED, PackQuantized

FORMATS: tuple[Format, ...] = (
    PackQuantized(),
    IntQuantized(),
    Fp8Block(),
    FloatQuantized(),
    Mxfp4Packed(),
    Nvfp4Packed(),
    Gptq(),
    Awq(),
    Bitsandbytes4("nf4"),
    Bitsandbytes4("fp4"),
    Bitsandbytes8(),
)
"""All that are written, those that most engines read before others that hold the same."""

READ_ONLY: tuple[Format, ...] = (
    GPTQ_V2,
    AUTO_ROUND_GPTQ,
    AUTO_ROUND,
    REORDERED,
    TENSOR_SCALED,
    MODELOPT_FP8,
    MODELOPT_ROWS,
    MODELOPT_TILES,
    MODELOPT_FLAT_TILES,
    Nvfp4ModelOpt(),
)
"""Those that only checkpoints of others have."""

IN_PACKAGES: tuple[Format, ...] = (MatMulNBits(),)
"""Those that no checkpoint has: weights of ONNX packages."""

METHODS = tuple(dict.fromkeys(form.quant_method for form in FORMATS))
"""What ``--format`` and policies choose among: the loaders, as ``quantization_config`` names them."""


def format_named(name: str) -> Format:
    """The format that plans call ``name``.

    Raises:
        FormatError: there is none.
    """
    for known in (*FORMATS, *READ_ONLY, *IN_PACKAGES):
        if known.name == name:
            return known
    raise FormatError(f"no format is called {name!r}; there are {', '.join(known.name for known in FORMATS)}")


def format_for(scheme: Scheme, method: str | None = None) -> Format:
    """The first format that holds ``scheme``, of those that the loader ``method`` reads.

    Raises:
        FormatError: none does, with the reason of each.
    """
    reasons = []
    for known in [form for form in FORMATS if method in (None, form.quant_method)]:
        try:
            known.check_scheme(scheme)
        except FormatError as reason:
            reasons.append(str(reason))
        else:
            return known
    raise FormatError(f"no format {f'of {method} ' if method else ''}holds {scheme}: {'; '.join(reasons)}")


def scheme_for(scheme: Scheme, method: str | None) -> Scheme:
    """``scheme`` as the loader ``method`` keeps it: where that has F16 scales only, ones exact in their old type too.

    Raises:
        FormatError: no format of ``method`` holds it.
    """
    half = replace(scheme, scale=replace(scheme.scale, dtype=DType.F16, exact_in=scheme.scale.dtype))
    try:
        format_for(scheme, method)
    except FormatError as reason:
        try:
            format_for(half, method)
        except FormatError:
            raise reason from None
        return half
    return scheme


def stored_bytes(scheme: Scheme, shape: tuple[int, int], method: str | None = None) -> int:
    """Bytes of a [N, K] matrix in ``scheme``, as the loader ``method`` has it, with all its parts.

    Raises:
        FormatError: no format holds it.
    """
    parts = format_for(scheme, method).parts(scheme, shape)
    return sum(prod(part.shape) * part.dtype.itemsize for part in parts)
