"""Every way to write a decoder."""

from __future__ import annotations

from qconvert.core.errors import UsageError
from qconvert.onnx_export.contrib import Contrib
from qconvert.onnx_export.cuda import Cuda
from qconvert.onnx_export.functions import Functions
from qconvert.onnx_export.operator_set import OperatorSet
from qconvert.onnx_export.precision import CPU, Precision
from qconvert.onnx_export.standard import Standard

OPERATOR_SETS: tuple[OperatorSet, ...] = (Contrib(), Standard(), Functions())


def operator_set(name: str) -> OperatorSet:
    """The set of that name.

    Raises:
        UsageError: there is none.
    """
    for one in OPERATOR_SETS:
        if one.name == name:
            return one
    known = ", ".join(one.name for one in OPERATOR_SETS)
    raise UsageError(f"operators {name!r} are unknown; expected one of {known}")


def operators_for(name: str, precision: Precision) -> OperatorSet:
    """The set of that name as a provider has it.

    Raises:
        UsageError: there is none, or the provider runs another one alone.
    """
    known = operator_set(name)
    if precision.ep == CPU:
        return known
    if known.name != Contrib().name:
        raise UsageError(f"--ep {precision.ep} is written in the operators {Contrib().name!r}, not in {name!r}")
    return Cuda(products=precision.products)
