"""Where every matrix of a checkpoint is, and how it is stored: read off the configuration and the headers together."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from types import MappingProxyType

from qconvert.arch.families import read_config
from qconvert.arch.names import Naming, module_of, naming_of, role_of
from qconvert.arch.shapes import expected_shape, is_linear_weight
from qconvert.core.dtypes import DType
from qconvert.core.errors import FormatError, SourceError
from qconvert.core.plan import Slice
from qconvert.core.role import EXPERT_KINDS, Kind, Part, TensorRole
from qconvert.core.scheme import Scheme
from qconvert.core.tensor_info import TensorInfo
from qconvert.formats.base import Format
from qconvert.formats.declaration import Declaration, Declared
from qconvert.formats.declared import read_declared
from qconvert.io.checkpoint import Checkpoint
from qconvert.transform.experts import unstack
from reference_model.config import ModelConfig

SCALE_DTYPES = (DType.BF16, DType.F32, DType.F16, DType.F8_E8M0, DType.F8_E4M3)
"""Element types that stored scales have; a configuration does not name it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Stored:
    """One tensor of the architecture on disk. Experts that are stored stacked are one of these each.

    Attributes:
        name: of the tensor that holds it, or of its module where it is quantized.
        shape: of the tensor itself, not of what is stored.
        plain: the rows that hold it; ``None`` where it is quantized.
        format: how it is quantized; ``None`` where it is plain, like ``scheme``.
        parts: suffix -> tensor name of a quantized matrix, in the order of the format.
    """

    role: TensorRole
    name: str
    shape: tuple[int, ...]
    plain: Slice | None = None
    format: Format | None = None
    scheme: Scheme | None = None
    parts: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class Problem:
    """A contradiction between headers, configuration and architecture; ``role`` where it is known whose."""

    name: str
    message: str
    role: TensorRole | None = None

    def __str__(self) -> str:
        return f"{self.name}: {self.message}"


@dataclass(frozen=True, slots=True, kw_only=True)
class QuantizedView:
    """Every stored tensor by role, routed experts one matrix each, and whatever could not be placed."""

    config: ModelConfig
    naming: Naming
    stored: Mapping[TensorRole, Stored]
    problems: tuple[Problem, ...]


def view(checkpoint: Checkpoint) -> QuantizedView:
    """Find every tensor of ``checkpoint``; what contradicts itself is listed in ``problems`` and not in ``stored``.

    Raises:
        SourceError: another architecture, a configuration that cannot be read, or names under two prefixes.
    """
    config = read_config(checkpoint.config, checkpoint.path)
    survey = _Survey(config, read_declared(checkpoint.config))
    naming = naming_of(checkpoint.tensors)
    plain, modules = _sort(checkpoint.tensors, survey)
    for module, parts in modules.items():
        survey.add_quantized(module, parts)
    for name, role in plain.items():
        survey.add_plain(role, checkpoint.tensors[name])
    return QuantizedView(
        config=config,
        naming=naming,
        stored=MappingProxyType(survey.stored),
        problems=tuple(survey.problems),
    )


class _Survey:
    """What has been found so far."""

    def __init__(self, config: ModelConfig, declared: Declared) -> None:
        self.config = config
        self.declared = declared
        self.stored: dict[TensorRole, Stored] = {}
        self.problems: list[Problem] = []

    def problem(self, name: str, message: str, role: TensorRole | None = None) -> None:
        self.problems.append(Problem(name=name, message=message, role=role))

    def add(self, stored: Stored) -> None:
        known = self.stored.get(stored.role)
        if known is not None:
            self.problem(stored.name, f"holds the same as {known.name}: {stored.role}", stored.role)
            return
        self.stored[stored.role] = stored

    def shape(self, role: TensorRole, name: str) -> tuple[int, ...] | None:
        try:
            return expected_shape(role, self.config)
        except KeyError:
            self.problem(name, f"config.json describes no such tensor: {role}", role)
            return None

    def add_plain(self, role: TensorRole, info: TensorInfo) -> None:
        shape = self.shape(role, info.name)
        if shape is None:
            return
        if info.shape != shape:
            self.problem(info.name, f"is {list(info.shape)}, config.json asks for {list(shape)}", role)
            return
        if role.kind not in EXPERT_KINDS or role.expert is not None:
            end = info.numel // shape[-1] if len(shape) > 1 else shape[0]
            self._add_one(role, info.name, shape, Slice(tensor=info.name, begin=0, end=end), module_of(info.name))
            return
        block = info.name.rpartition(".")[0]
        for one, rows in unstack(info, role):
            inside = (rows.end - rows.begin, shape[2])
            self._add_one(one, info.name, inside, rows, f"{block}.{one.expert}.{_EXPERT_MODULES[one.kind]}")

    def _add_one(self, role: TensorRole, name: str, shape: tuple[int, ...], rows: Slice, module: str) -> None:
        declaration = self.declared.of(module) if is_linear_weight(role) else None
        if declaration is not None and self.declared.complete:
            self.problem(
                module,
                f"quantization_config declares {declaration.scheme} for it, but it is stored as a plain tensor: "
                "quantize it or list it as ignored",
                role,
            )
        self.add(Stored(role=role, name=name, shape=shape, plain=rows))

    def add_quantized(self, module: str, parts: Mapping[str, TensorInfo]) -> None:
        role = role_of(f"{module}.weight")
        shape = self.shape(role, module)
        declaration = self.declared.of(module)
        if shape is None:
            return
        if declaration is None or len(shape) != 2:
            self.problem(
                module,
                f"is stored as {', '.join(sorted(parts))}, but quantization_config declares no scheme for it",
                role,
            )
            return
        scheme = self._scheme(module, role, declaration, (shape[0], shape[1]), parts)
        if scheme is not None:
            specs = declaration.format.parts(scheme, (shape[0], shape[1]))
            names = MappingProxyType({spec.suffix: parts[spec.suffix].name for spec in specs})
            self.add(Stored(role=role, name=module, shape=shape, format=declaration.format, scheme=scheme, parts=names))

    def _scheme(
        self,
        module: str,
        role: TensorRole,
        declaration: Declaration,
        shape: tuple[int, int],
        parts: Mapping[str, TensorInfo],
    ) -> Scheme | None:
        """The declared scheme with the type of scales under which the format's parts are just those stored."""
        found = {suffix: (info.dtype, info.shape) for suffix, info in parts.items()}
        complaints: list[tuple[int, str]] = []
        for dtype in SCALE_DTYPES:
            scheme = replace(declaration.scheme, scale=replace(declaration.scheme.scale, dtype=dtype))
            try:
                specs = declaration.format.parts(scheme, shape)
            except FormatError as error:
                complaints.append((len(found), str(error)))
                continue
            wanted = {spec.suffix: (spec.dtype, spec.shape) for spec in specs}
            if wanted == found:
                return scheme
            other_types = sum(wanted[name][0] is not found[name][0] for name in wanted.keys() & found.keys())
            complaints.append((other_types, _difference(wanted, found)))
        self.problem(module, min(complaints, key=lambda pair: pair[0])[1], role)
        return None


def _sort(
    tensors: Mapping[str, TensorInfo], survey: _Survey
) -> tuple[dict[str, TensorRole], dict[str, dict[str, TensorInfo]]]:
    """Plain tensors with their roles, and the parts of quantized modules; names of no tensor become problems."""
    plain: dict[str, TensorRole] = {}
    modules: dict[str, dict[str, TensorInfo]] = {}
    for name, info in tensors.items():
        role = _role(name)
        if role is not None and info.dtype.is_weight:
            plain[name] = role
            continue
        module = _module(name)
        if module is None:
            what = (
                "is no tensor of this architecture" if role is None else f"is {info.dtype} in a layout that is unknown"
            )
            survey.problem(name, what, role)
            continue
        modules.setdefault(module, {})[name[len(module) + 1 :]] = info
    for module, parts in modules.items():
        # weights in 16 bits beside scales belong to the module: its format says what is wrong with them
        if plain.pop(f"{module}.weight", None) is not None:
            parts["weight"] = tensors[f"{module}.weight"]
    return plain, modules


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
) -> str:
    said = [f"{suffix} is missing" for suffix in wanted if suffix not in found]
    said += [f"{suffix} does not belong there" for suffix in found if suffix not in wanted]
    for suffix in wanted.keys() & found.keys():
        if wanted[suffix] != found[suffix]:
            (dtype, shape), (is_dtype, is_shape) = wanted[suffix], found[suffix]
            said.append(f"{suffix} is {is_dtype} {list(is_shape)}, expected {dtype} {list(shape)}")
    return "; ".join(said)


_EXPERT_MODULES = {Kind.EXPERT_GATE: "gate_proj", Kind.EXPERT_UP: "up_proj", Kind.EXPERT_DOWN: "down_proj"}
