"""Where every matrix of a checkpoint is, and how it is stored: read off the configuration and the headers together."""

from __future__ import annotations

import enum
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from itertools import product
from types import MappingProxyType

from qconvert.arch.families import read_config
from qconvert.arch.names import Naming, module_of, naming_of, role_of
from qconvert.arch.shapes import STACKED, expected_shape, is_linear_weight
from qconvert.core.dtypes import DType
from qconvert.core.errors import FormatError, SourceError
from qconvert.core.plan import Slice
from qconvert.core.role import EXPERT_KINDS, Kind, Part, TensorRole
from qconvert.core.scheme import Scheme
from qconvert.core.tensor_info import TensorInfo
from qconvert.formats.base import Format
from qconvert.formats.declaration import Declaration, Declared
from qconvert.formats.declared import read_declared
from qconvert.formats.fp8_block import Fp8Block
from qconvert.formats.scaled_weight import WEIGHT
from qconvert.io.checkpoint import Checkpoint
from qconvert.transform.experts import unstack
from reference_model.config import ModelConfig

SCALE_DTYPES = (DType.BF16, DType.F32, DType.F16, DType.F8_E8M0, DType.F8_E4M3)
"""Element types that stored scales have; a configuration does not name it."""

CACHE_SCALES = ("k_scale", "v_scale", "output_scale", "prob_output_scale")
"""What tells how keys and values are cached, beside attention or its projections: no part of a weight."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Stored:
    """One tensor of the architecture on disk. Experts that are stored stacked are one of these each.

    Attributes:
        name: of the tensor that holds it, or of its module where it is quantized.
        shape: of the tensor itself, not of what is stored.
        plain: the rows that hold it; ``None`` where it is quantized.
        format: how it is quantized; ``None`` where it is plain, like ``scheme``.
        parts: suffix -> the rows that hold this part of a quantized matrix, in the order of the format.
    """

    role: TensorRole
    name: str
    shape: tuple[int, ...]
    plain: Slice | None = None
    format: Format | None = None
    scheme: Scheme | None = None
    parts: Mapping[str, Slice] = field(default_factory=dict)


class ProblemKind(enum.Enum):
    """What a contradiction amounts to for whoever loads the checkpoint."""

    MISSING = "missing"
    UNKNOWN = "unknown"
    MISSHAPEN = "misshapen"
    UNREADABLE = "in a layout that is not known here"


@dataclass(frozen=True, slots=True, kw_only=True)
class Problem:
    """A contradiction between headers, configuration and architecture; ``role`` where it is known whose."""

    kind: ProblemKind
    name: str
    message: str
    role: TensorRole | None = None

    def __str__(self) -> str:
        return f"{self.name}: {self.message}"


@dataclass(frozen=True, slots=True, kw_only=True)
class QuantizedView:
    """Every stored tensor by role, routed experts one matrix each, and whatever could not be placed.

    Attributes:
        cache_scales: names of tensors that are about the cache of keys and values, and about no weight.
    """

    config: ModelConfig
    naming: Naming
    stored: Mapping[TensorRole, Stored]
    problems: tuple[Problem, ...]
    cache_scales: tuple[str, ...] = ()


def view(checkpoint: Checkpoint) -> QuantizedView:
    """Find every tensor of ``checkpoint``; what contradicts itself is listed in ``problems`` and not in ``stored``.

    Raises:
        SourceError: another architecture, a configuration that cannot be read, or names under two prefixes.
    """
    config = read_config(checkpoint.config, checkpoint.path)
    survey = _Survey(config, read_declared(checkpoint.config))
    naming = naming_of(checkpoint.tensors)
    weights, cache = _apart(checkpoint.tensors)
    plain, modules, stacks = _sort(weights, survey)
    for module, parts in modules.items():
        survey.add_quantized(module, {suffix: _whole(info) for suffix, info in parts.items()})
    for stack, parts in stacks.items():
        survey.add_stack(stack, role_of(stack), parts)
    for name, role in plain.items():
        survey.add_plain(role, checkpoint.tensors[name])
    return QuantizedView(
        config=config,
        naming=naming,
        stored=MappingProxyType(survey.stored),
        problems=tuple(survey.problems),
        cache_scales=cache,
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class _Part:
    """A part of one quantized matrix: a tensor, or some of its rows."""

    dtype: DType
    shape: tuple[int, ...]
    rows: Slice


def _whole(info: TensorInfo) -> _Part:
    rows = Slice(tensor=info.name, begin=0, end=info.numel // max(info.row_width, 1))
    return _Part(dtype=info.dtype, shape=info.shape, rows=rows)


class _Survey:
    """What has been found so far."""

    def __init__(self, config: ModelConfig, declared: Declared) -> None:
        self.config = config
        self.declared = declared
        self.stored: dict[TensorRole, Stored] = {}
        self.problems: list[Problem] = []

    def problem(self, kind: ProblemKind, name: str, message: str, role: TensorRole | None = None) -> None:
        self.problems.append(Problem(kind=kind, name=name, message=message, role=role))

    def add(self, stored: Stored) -> None:
        known = self.stored.get(stored.role)
        if known is not None:
            message = f"holds the same as {known.name}: {stored.role}"
            self.problem(ProblemKind.UNKNOWN, stored.name, message, stored.role)
            return
        self.stored[stored.role] = stored

    def shape(self, role: TensorRole, name: str) -> tuple[int, ...] | None:
        try:
            return expected_shape(role, self.config)
        except KeyError:
            self.problem(ProblemKind.UNKNOWN, name, f"config.json describes no such tensor: {role}", role)
            return None

    def add_plain(self, role: TensorRole, info: TensorInfo) -> None:
        shape = self.shape(role, info.name)
        if shape is None:
            return
        if info.shape != shape:
            message = f"is {list(info.shape)}, config.json asks for {list(shape)}"
            self.problem(ProblemKind.MISSHAPEN, info.name, message, role)
            return
        if role.kind not in EXPERT_KINDS or role.expert is not None:
            end = info.numel // shape[-1] if len(shape) > 1 else shape[0]
            self._add_one(role, info.name, shape, Slice(tensor=info.name, begin=0, end=end), module_of(info.name))
            return
        for one, rows in unstack(info, role):
            self._add_one(one, info.name, (rows.end - rows.begin, shape[2]), rows, _expert_module(info.name, one))

    def _add_one(self, role: TensorRole, name: str, shape: tuple[int, ...], rows: Slice, module: str) -> None:
        declaration = self.declared.of(module) if is_linear_weight(role) else None
        if declaration is not None and self.declared.complete:
            self.problem(
                ProblemKind.MISSHAPEN,
                module,
                f"quantization_config declares {declaration.scheme} for it, but it is stored as a plain tensor: "
                "quantize it or list it as ignored",
                role,
            )
        self.add(Stored(role=role, name=name, shape=shape, plain=rows))

    def add_stack(self, name: str, role: TensorRole, parts: Mapping[str, TensorInfo]) -> None:
        """Quantized experts of a layer in one tensor of codes and one of scales, which are cut into those of each."""
        shape, first = self.shape(role, name), self.declared.of(_expert_module(name, replace(role, expert=0)))
        if shape is None:
            return
        if missing := [f"{name}{end}" for end, suffix in _STACK_PARTS.items() if suffix not in parts]:
            self.problem(ProblemKind.MISSING, name, f"{missing[0]} is missing", role)
            return
        if first is None or first.format != Fp8Block():
            self.problem(ProblemKind.UNREADABLE, name, f"is {parts[WEIGHT].dtype} in a layout that is unknown", role)
            return
        if parts[WEIGHT].shape != shape:
            message = f"is {list(parts[WEIGHT].shape)}, config.json asks for {list(shape)}"
            self.problem(ProblemKind.MISSHAPEN, name, message, role)
            return
        experts: dict[str, dict[str, _Part]] = {}
        for suffix, info in parts.items():
            odd = len(info.shape) == 3 and role.kind is Kind.EXPERT_GATE_UP and info.shape[1] % 2
            if len(info.shape) != 3 or info.shape[0] != shape[0] or odd:
                message = f"is {list(info.shape)}, expected a row of tiles for every part of {shape[0]} experts"
                self.problem(ProblemKind.MISSHAPEN, info.name, message, role)
                return
            for one, rows in unstack(info, role):
                part = _Part(dtype=info.dtype, shape=(rows.end - rows.begin, info.shape[2]), rows=rows)
                experts.setdefault(_expert_module(name, one), {})[suffix] = part
        for module, found in experts.items():
            self.add_quantized(module, found)

    def add_quantized(self, module: str, parts: Mapping[str, _Part]) -> None:
        role = role_of(f"{module}.weight")
        shape = self.shape(role, module)
        declaration = self.declared.of(module)
        if shape is None:
            return
        if declaration is None or len(shape) != 2:
            self.problem(
                ProblemKind.MISSHAPEN,
                module,
                f"is stored as {', '.join(sorted(parts))}, but quantization_config declares no scheme for it",
                role,
            )
            return
        way = self._way(module, role, declaration, (shape[0], shape[1]), parts)
        if way is not None:
            form, scheme = way
            specs = form.parts(scheme, (shape[0], shape[1]))
            rows = MappingProxyType({spec.suffix: parts[spec.suffix].rows for spec in specs})
            self.add(Stored(role=role, name=module, shape=shape, format=form, scheme=scheme, parts=rows))

    def _way(
        self,
        module: str,
        role: TensorRole,
        declaration: Declaration,
        shape: tuple[int, int],
        parts: Mapping[str, _Part],
    ) -> tuple[Format, Scheme] | None:
        """The declared format and scheme, with the type of scales under which the parts are just those stored."""
        found = {suffix: (part.dtype, part.shape) for suffix, part in parts.items()}
        complaints: list[tuple[int, ProblemKind, str]] = []
        for form, dtype in product((declaration.format, *declaration.otherwise), SCALE_DTYPES):
            scheme = replace(declaration.scheme, scale=replace(declaration.scheme.scale, dtype=dtype))
            try:
                specs = form.parts(scheme, shape)
            except FormatError as error:
                complaints.append((len(found), ProblemKind.MISSHAPEN, str(error)))
                continue
            wanted = {spec.suffix: (spec.dtype, spec.shape) for spec in specs}
            if wanted == found:
                return form, scheme
            other_types = sum(wanted[name][0] is not found[name][0] for name in wanted.keys() & found.keys())
            complaints.append((other_types, *_difference(wanted, found)))
        _, kind, message = min(complaints, key=lambda one: one[0])
        self.problem(kind, module, message, role)
        return None


def _apart(tensors: Mapping[str, TensorInfo]) -> tuple[dict[str, TensorInfo], tuple[str, ...]]:
    """What belongs to weights, and the names of what is about the cache."""
    cache = tuple(name for name in tensors if name.rpartition(".")[2] in CACHE_SCALES)
    return {name: info for name, info in tensors.items() if name.rpartition(".")[2] not in CACHE_SCALES}, cache


_Sorted = tuple[dict[str, TensorRole], dict[str, dict[str, TensorInfo]], dict[str, dict[str, TensorInfo]]]


def _sort(tensors: Mapping[str, TensorInfo], survey: _Survey) -> _Sorted:
    """Plain tensors with their roles, the parts of quantized modules, and those of quantized stacks of experts.

    Names of no tensor become problems.
    """
    plain: dict[str, TensorRole] = {}
    modules: dict[str, dict[str, TensorInfo]] = {}
    stacks: dict[str, dict[str, TensorInfo]] = {}
    for name, info in tensors.items():
        role = _role(name)
        if role is not None and info.dtype.is_weight:
            plain[name] = role
            continue
        if (part := _stack_part(name)) is not None:
            stacks.setdefault(part[0], {})[part[1]] = info
            continue
        module = _module(name)
        if module is None:
            if role is None:
                survey.problem(ProblemKind.UNKNOWN, name, "is no tensor of this architecture")
            else:
                survey.problem(ProblemKind.UNREADABLE, name, f"is {info.dtype} in a layout that is unknown", role)
            continue
        modules.setdefault(module, {})[name[len(module) + 1 :]] = info
    for module, parts in modules.items():
        # weights in 16 bits beside scales belong to the module: its format says what is wrong with them
        if plain.pop(f"{module}.weight", None) is not None:
            parts[WEIGHT] = tensors[f"{module}.weight"]
    return plain, modules, stacks


_STACK_PARTS = {"": WEIGHT, "_scale_inv": Fp8Block().scale}
"""What follows the name of a stack of experts, and the part of each expert's matrix that it holds."""


_STACK_NAMES = (".gate_up_proj", ".down_proj")


def _stack_part(name: str) -> tuple[str, str] | None:
    """The stack of experts that ``name`` is a part of, and which."""
    for end, suffix in _STACK_PARTS.items():
        stack = name.removesuffix(end)
        if name.endswith(end) and stack.endswith(_STACK_NAMES):
            role = _role(stack)
            if role is not None and role.kind in STACKED and role.expert is None:
                return stack, suffix
    return None


def _role(name: str) -> TensorRole | None:
    try:
        return role_of(name)
    except SourceError:
        return None


def _module(name: str) -> str | None:
    """The matrix's module that a part called ``name`` belongs to: formats add one or more dotted steps."""
    module = name
    while "." in module:
        module = module.rpartition(".")[0]
        role = _role(f"{module}.weight")
        if role is not None and role.part is Part.WEIGHT:
            return module
    return None


def _difference(
    wanted: Mapping[str, tuple[DType, tuple[int, ...]]], found: Mapping[str, tuple[DType, tuple[int, ...]]]
) -> tuple[ProblemKind, str]:
    missing = [f"{suffix} is missing" for suffix in wanted if suffix not in found]
    extra = [f"{suffix} does not belong there" for suffix in found if suffix not in wanted]
    said = [*missing, *extra]
    for suffix in wanted.keys() & found.keys():
        if wanted[suffix] != found[suffix]:
            (dtype, shape), (is_dtype, is_shape) = wanted[suffix], found[suffix]
            said.append(f"{suffix} is {is_dtype} {list(is_shape)}, expected {dtype} {list(shape)}")
    kind = ProblemKind.MISSING if missing else ProblemKind.UNKNOWN if extra else ProblemKind.MISSHAPEN
    return kind, "; ".join(said)


_EXPERT_MODULES = {
    Kind.EXPERT_GATE_UP: "gate_proj",
    Kind.EXPERT_GATE: "gate_proj",
    Kind.EXPERT_UP: "up_proj",
    Kind.EXPERT_DOWN: "down_proj",
}


def _expert_module(stack: str, role: TensorRole) -> str:
    """The module of one expert's matrix that is stored in the tensor ``stack``; of a whole stack, of its first."""
    return f"{stack.rpartition('.')[0]}.{role.expert}.{_EXPERT_MODULES[role.kind]}"
