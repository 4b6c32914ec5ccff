"""What rules look at: matrices by name, how each is stored and declared; blocks of experts as one.

A block of experts is one thing here, whatever the number of its tensors: engines decide for all of them at once, and a
large checkpoint has some 280,000 tensors.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from qconvert.arch.names import role_of
from qconvert.arch.shapes import expected_shape, is_linear_weight
from qconvert.core.errors import SourceError
from qconvert.core.role import Kind, TensorRole
from qconvert.core.tensor_info import TensorInfo
from qconvert.formats.declaration import Declaration, Declared
from qconvert.formats.declared import read_declared
from qconvert.formats.engine_rules import STACKED
from qconvert.quantized_view import CACHE_SCALES, ProblemKind
from reference_model.config import ModelConfig

Storage = frozenset[tuple[str, str]]
"""Suffix and element type of each part of a quantized matrix; empty for a plain one."""

PLAIN: Storage = frozenset()

_EXPERT = re.compile(
    r"^(.*\.mlp\.experts)\.(?:(\d+)\.(gate_proj|up_proj|down_proj)\.(.+)|(gate_up_proj|down_proj)(.*))$"
)
_PARTS = {"gate_proj": Kind.EXPERT_GATE, "up_proj": Kind.EXPERT_UP, "down_proj": Kind.EXPERT_DOWN}
_DENSE_BY_NATURE = (Kind.ROUTER, Kind.SHARED_EXPERT_GATE)


@dataclass(frozen=True, slots=True, kw_only=True)
class Linear:
    """A matrix that multiplies activations, routed experts left out.

    Attributes:
        name: of the module, in the checkpoint.
        shape: [N, K] of the matrix.
        declaration: what the configuration says of it, under its own name.
    """

    name: str
    role: TensorRole
    shape: tuple[int, int]
    storage: Storage
    declaration: Declaration | None

    @property
    def quantized(self) -> bool:
        """Whether it is stored quantized."""
        return self.storage != PLAIN


@dataclass(frozen=True, slots=True, kw_only=True)
class Site:
    """What engines make one module of: one matrix, or several stacked ones."""

    name: str
    members: tuple[Linear, ...]

    @property
    def quantized(self) -> bool | None:
        """How all members are stored; ``None`` where they differ."""
        ways = {member.quantized for member in self.members}
        return ways.pop() if len(ways) == 1 else None


@dataclass(frozen=True, slots=True, kw_only=True)
class ExpertBlock:
    """The routed experts of one layer.

    Attributes:
        name: ``<layer>.mlp.experts``.
        stacked: whether one tensor holds a projection of all of them.
        storages: how each projection is stored, and by how many tensors in that way.
        declarations: what the configuration says of expert 0's gate, up and down.
    """

    name: str
    stacked: bool
    storages: Mapping[tuple[str, Storage], int]
    declarations: tuple[Declaration | None, ...]

    @property
    def quantized(self) -> bool | None:
        """How all are stored; ``None`` where they differ."""
        ways = {storage != PLAIN for _, storage in self.storages}
        return ways.pop() if len(ways) == 1 else None

    @property
    def in_mtp(self) -> bool:
        """Whether they are the draft head's."""
        return self.name.startswith("mtp.")


@dataclass(frozen=True, slots=True, kw_only=True)
class View:
    """A checkpoint as engines see it before they read weights.

    Attributes:
        quantization: the ``quantization_config`` block, empty where there is none.
        dense_by_nature: routers and the gates of shared experts.
        tp: ranks that a model is split among.
        problems: kind of what is wrong as stored, the module or tensor, and how.
    """

    config: ModelConfig
    quantization: Mapping[str, Any]
    declared: Declared
    linears: tuple[Linear, ...]
    dense_by_nature: tuple[Linear, ...]
    sites: tuple[Site, ...]
    experts: tuple[ExpertBlock, ...]
    names: tuple[str, ...]
    tp: int = 1
    problems: tuple[tuple[ProblemKind, str, str], ...] = ()

    @property
    def method(self) -> str | None:
        """The ``quant_method``."""
        return self.quantization.get("quant_method")

    @property
    def mapped(self) -> bool:
        """Whether the checkpoint has the names of one with a vision tower, which vLLM maps."""
        return any(name.startswith("model.language_model.") for name in self.names)


def build_view(config: ModelConfig, raw: Mapping[str, Any], tensors: Iterable[TensorInfo], *, tp: int = 1) -> View:
    """Sort tensors into matrices and blocks; tensors of no matrix are passed over.

    ``raw`` is the parsed ``config.json``, which ``config`` was read from.

    Raises:
        SourceError: ``quantization_config`` cannot be read.
    """
    declared = read_declared(raw)
    parts: dict[str, dict[str, str]] = {}
    blocks: dict[str, dict[tuple[int, str], dict[str, str]]] = {}
    for info in tensors:
        name = info.name
        expert = _EXPERT.match(name)
        if expert is not None:
            block, index, part, suffix, stack, rest = expert.groups()
            key = (int(index), part) if index is not None else (-1, stack)
            blocks.setdefault(block, {}).setdefault(key, {})[suffix if index is not None else rest] = str(info.dtype)
            continue
        module, suffix = _split(name)
        if module:
            parts.setdefault(module, {})[suffix] = str(info.dtype)
    linears = list(_linears(parts, config, declared))
    return View(
        config=config,
        quantization=_block(raw),
        declared=declared,
        linears=tuple(one for one in linears if one.role.kind not in _DENSE_BY_NATURE),
        dense_by_nature=tuple(one for one in linears if one.role.kind in _DENSE_BY_NATURE),
        sites=tuple(_sites(one for one in linears if one.role.kind not in _DENSE_BY_NATURE)),
        experts=tuple(_expert_block(name, found, declared) for name, found in blocks.items()),
        names=tuple(parts),
        tp=tp,
    )


def quantized_stack(info: TensorInfo | None) -> str | None:
    """``...mlp.experts`` for codes or scales of all experts of a layer in one tensor."""
    found = None if info is None else _EXPERT.match(info.name)
    if info is None or found is None or found[5] is None:
        return None
    return found[1] if found[6] or not info.dtype.is_weight else None


def _block(raw: Mapping[str, Any]) -> Mapping[str, Any]:
    text = raw.get("text_config")
    return (
        raw.get("quantization_config") or (text.get("quantization_config") if isinstance(text, Mapping) else {}) or {}
    )


def _role(name: str) -> TensorRole | None:
    try:
        return role_of(name)
    except SourceError:
        return None


def _split(name: str) -> tuple[str, str]:
    """Module and suffix of a tensor; empty for one that belongs to no matrix."""
    module = name
    while "." in module:
        module = module.rpartition(".")[0]
        role = _role(f"{module}.weight")
        if role is not None:
            return module, name[len(module) + 1 :]
    return "", name


def _storage(parts: Mapping[str, str]) -> Storage:
    """Everything but a bias and scales of the cache; nothing for a weight in 16 or 32 bits without scales."""
    found = frozenset((suffix, dtype) for suffix, dtype in parts.items() if suffix not in ("bias", *CACHE_SCALES))
    plain = all(suffix in ("weight", "") and dtype in ("BF16", "F16", "F32") for suffix, dtype in found)
    return PLAIN if plain else found


def _linears(parts: Mapping[str, Mapping[str, str]], config: ModelConfig, declared: Declared) -> Iterator[Linear]:
    for module, found in parts.items():
        role = role_of(f"{module}.weight")
        if not is_linear_weight(role) and role.kind not in _DENSE_BY_NATURE:
            continue
        try:
            rows, cols = expected_shape(role, config)
        except KeyError:
            continue  # no such tensor in this configuration: a matter of completeness
        yield Linear(
            name=module, role=role, shape=(rows, cols), storage=_storage(found), declaration=declared.of(module)
        )  # fmt: skip


def _sites(linears: Iterable[Linear]) -> Iterator[Site]:
    stack_of = {part: (stack, parts) for stack, parts in STACKED for part in parts}
    found: dict[str, list[Linear]] = {}
    for linear in linears:
        stem, _, part = linear.name.rpartition(".")
        name = f"{stem}.{stack_of[part][0]}" if part in stack_of else linear.name
        found.setdefault(name, []).append(linear)
    for name, members in found.items():
        yield Site(name=name, members=tuple(members))


def _expert_block(name: str, found: Mapping[tuple[int, str], Mapping[str, str]], declared: Declared) -> ExpertBlock:
    storages: dict[tuple[str, Storage], int] = {}
    for (_, part), parts in found.items():
        key = part, _storage(parts)
        storages[key] = storages.get(key, 0) + 1
    return ExpertBlock(
        name=name,
        stacked=any(index < 0 for index, _ in found),
        storages=storages,
        declarations=tuple(declared.of(f"{name}.0.{part}") for part in _PARTS),
    )
