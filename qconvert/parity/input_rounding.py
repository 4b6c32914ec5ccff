"""What engines do to the inputs of a checkpoint's quantized matrices, with what is stored of them."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Callable, Container, Mapping
from functools import partial
from operator import attrgetter

from torch import Tensor

from qconvert.arch.names import Naming, module_of, name_of
from qconvert.core.role import EXPERT_KINDS, STACKED_KINDS, Kind, Section, TensorRole
from qconvert.core.scheme import Activation
from qconvert.formats.base import InputScale
from qconvert.numerics.activations import quantize_activations
from qconvert.weights.source import CheckpointWeights
from reference_model.layer_pass import InputRounding

_EXPERT = re.compile(r"mlp\.experts\.\d+\.(gate|down)(?:_up)?_proj")
_FIRST = {kind: kinds[0] for kinds in STACKED_KINDS for kind in kinds}


def served_rounding(source: CheckpointWeights, restored: Container[TensorRole] = ()) -> InputRounding | None:
    """What engines do to the inputs of each quantized matrix; ``None`` when they leave all of them alone.

    Matrices that are ``restored`` are not quantized any more; of a ``q_proj`` both halves have to be. The experts of a
    layer share one scheme in every engine: that of the first.

    Raises:
        FormatError: a stored scale of inputs that is zero, negative or not finite; names the module.
    """
    activations = {
        role: scheme.activation
        for role in source.stored
        if role.section is Section.TEXT
        and (scheme := source.scheme(role)) is not None
        and scheme.activation != Activation()
        and not all(one in restored for one in role.halves or (role,))
    }
    return rounding_of(activations, _served_scales(source, activations))


def rounding_of(
    activations: Mapping[TensorRole, Activation], scales: Mapping[TensorRole, float] | None = None
) -> InputRounding | None:
    """The same for matrices of which it is known what engines do to their inputs, and by which stored scale."""
    rounded = {
        module_of(name_of(role, Naming.TEXT)).removeprefix(Naming.TEXT.value): partial(
            quantize_activations, activation=activation, scale=(scales or {}).get(role)
        )
        for role, activation in activations.items()
        if activation != Activation() and role.expert in (None, 0)
    }
    if not rounded:
        return None

    def of(module: str) -> Callable[[Tensor], Tensor] | None:
        return rounded.get(_EXPERT.sub(r"mlp.experts.0.\1_proj", module))

    return of


def _served_scales(source: CheckpointWeights, activations: Mapping[TensorRole, Activation]) -> dict[TensorRole, float]:
    """What is stored of inputs, as ``quantize_activations`` takes it, after an engine has put matrices together.

    vLLM 0.32 has one scale for what enters a stack, and one for all experts of a layer. Of single matrices it takes the
    largest number that is stored, whether that multiplies or divides; of experts the one with the widest range
    (compressed_tensors_w4a4_nvfp4.py, modelopt.py, and for its kernels of experts flashinfer_fp4_moe.py).
    """
    stacks: dict[tuple[Kind, int | None], dict[TensorRole, InputScale]] = defaultdict(dict)
    for role in activations:
        scale = source.input_scale(role)
        if scale is not None:
            stacks[_FIRST.get(role.kind, role.kind), role.layer][role] = scale
    taken = {}
    for (kind, _), scales in stacks.items():
        scale = max(scales.values(), key=attrgetter("multiplier" if kind in EXPERT_KINDS else "number"))
        for role in scales:
            taken[role] = scale.multiplier if activations[role].kind == "static" else scale.divisor
    return taken
