"""Inputs in activation order are found before anything is written: no format that is written keeps it."""

from __future__ import annotations

from qconvert.core.errors import DataError, FormatError, PlanError
from qconvert.core.plan import Plan, Reencode
from qconvert.formats.column_groups import check_groups_of_inputs
from qconvert.formats.gptq import GROUP_OF_INPUT
from qconvert.formats.pack_quantized import GROUP_OF_INPUT as PACKED_GROUP_OF_INPUT
from qconvert.io.checkpoint import Checkpoint


def check_column_order(plan: Plan, source: Checkpoint) -> None:
    """Read the group of every input of all matrices whose codes are to be moved: four bytes an input.

    Raises:
        PlanError: they are in activation order; names the first tensor.
        DataError: they are in no order at all: groups have too many inputs, or too few; names file and tensor.
        SourceError: a file cannot be read.
    """
    for step in plan.steps:
        packed = step.packed
        if not isinstance(step.action, Reencode) or packed is None:
            continue
        for part in step.inputs:
            if part.tensor.endswith((f".{GROUP_OF_INPUT}", f".{PACKED_GROUP_OF_INPUT}")):
                index, suffix = source.read(part.tensor), part.tensor.rpartition(".")[2]
                try:
                    ordered = check_groups_of_inputs(index, packed.scheme, packed.shape, suffix)
                except FormatError as error:
                    shard = source.tensors[part.tensor].shard
                    raise DataError(f"{shard}: {part.tensor} cannot be read: {error}; get the file again") from None
                if ordered is not None:
                    raise PlanError(
                        f"{part.tensor}: inputs are in activation order, and {step.action.format} is written without "
                        "one; dequantize and round anew with `qconvert quantize --from-quantized`"
                    )
