"""The ``quantization_config`` block read: which format and scheme it declares for a module."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from qconvert.core.dtypes import DType
from qconvert.core.errors import SourceError
from qconvert.core.scheme import Activation, Block, Blocking, Channel, Float, Group, Int, PerTensor, ScaleSpec, Scheme
from qconvert.formats.base import Format
from qconvert.formats.fp8_block import Fp8Block
from qconvert.formats.table import FORMATS


@dataclass(frozen=True, slots=True, kw_only=True)
class Declaration:
    """What the configuration says of one module. It never names the type of scales: ``scheme`` has BF16 there."""

    format: Format
    scheme: Scheme


class Declared(Protocol):
    """Everything that one ``quantization_config`` declares."""

    def of(self, module: str) -> Declaration | None:
        """How the linear module called ``module`` is stored; ``None`` for one that stays as it is."""
        ...


@dataclass(frozen=True, slots=True)
class NothingDeclared:
    """A checkpoint without ``quantization_config``."""

    def of(self, module: str) -> Declaration | None:
        """``None``."""
        return None


@dataclass(frozen=True, slots=True)
class NameList:
    """Entries of ``targets`` or ``ignore``: full names, ``re:`` patterns, the class ``Linear``."""

    exact: frozenset[str]
    patterns: tuple[re.Pattern[str], ...]

    def rank(self, module: str) -> int | None:
        """0 when the full name is listed, 1 for a pattern that matches, 2 for the class; ``None`` for no match."""
        if module in self.exact:
            return 0
        if any(pattern.match(module) for pattern in self.patterns):
            return 1
        return 2 if "Linear" in self.exact else None


@dataclass(frozen=True, slots=True, kw_only=True)
class CompressedTensors:
    """``quant_method: compressed-tensors``: groups with targets, and what they leave out.

    A full name decides before a pattern, a pattern before the class ``Linear``, the first group among equals
    (compressed-tensors 0.20).
    """

    groups: tuple[tuple[NameList, Declaration], ...]
    ignore: NameList

    def of(self, module: str) -> Declaration | None:
        """See ``Declared.of``."""
        if self.ignore.rank(module) is not None:
            return None
        best: tuple[int, Declaration] | None = None
        for targets, declaration in self.groups:
            rank = targets.rank(module)
            if rank is not None and (best is None or rank < best[0]):
                best = rank, declaration
        return None if best is None else best[1]


@dataclass(frozen=True, slots=True, kw_only=True)
class Fp8:
    """``quant_method: fp8``: every linear module but those listed, each by its name or that of a module around it."""

    declaration: Declaration
    kept: frozenset[str]

    def of(self, module: str) -> Declaration | None:
        """See ``Declared.of``."""
        steps = module.split(".")
        inside = any(".".join(steps[:i]) in self.kept for i in range(1, len(steps) + 1))
        return None if inside else self.declaration


def read_declared(config: Mapping[str, Any]) -> Declared:
    """Read the ``quantization_config`` of a parsed ``config.json``.

    Raises:
        SourceError: a method, format or argument that cannot be read here; the message names it.
    """
    block = config.get("quantization_config")
    if block is None and isinstance(config.get("text_config"), Mapping):
        block = config["text_config"].get("quantization_config")
    if block is None:
        return NothingDeclared()
    if not isinstance(block, Mapping):
        raise SourceError("config.json: quantization_config is no object")
    method = block.get("quant_method")
    for known, reader in _READERS:
        if known == method:
            return reader(block)
    raise SourceError(
        f"config.json: quant_method is {method!r}; checkpoints of {', '.join(name for name, _ in _READERS)} can be read"
    )


def _read_compressed_tensors(block: Mapping[str, Any]) -> Declared:
    groups = block.get("config_groups")
    if not isinstance(groups, Mapping) or not groups:
        raise SourceError("config.json: quantization_config has no config_groups")
    read = []
    for name, group in groups.items():
        where = f"quantization_config.config_groups.{name}"
        form = _format(group.get("format") or block.get("format"), "compressed-tensors", where)
        scheme = _scheme(group, where)
        read.append((_names(group.get("targets"), f"{where}.targets"), Declaration(format=form, scheme=scheme)))
    ignore = _names(block.get("ignore") or (), "quantization_config.ignore")
    return CompressedTensors(groups=tuple(read), ignore=ignore)


def _read_fp8(block: Mapping[str, Any]) -> Declared:
    where = "quantization_config"
    size = block.get("weight_block_size")
    if not isinstance(size, Sequence) or len(size) != 2:
        raise SourceError(f"config.json: {where}.weight_block_size is {size!r}; only tiles can be read, not one scale")
    if block.get("activation_scheme", "dynamic") != "dynamic":
        raise SourceError(f"config.json: {where}.activation_scheme is {block['activation_scheme']!r}, not 'dynamic'")
    grid = Float(kind="e4m3fn")
    scheme = Scheme(
        grid=grid,
        blocking=Block(rows=int(size[0]), cols=int(size[1])),
        scale=ScaleSpec(dtype=DType.BF16),
        activation=Activation(kind="dynamic", grid=grid, group=int(size[1])),
    )
    kept = {
        name
        for field in ("modules_to_not_convert", "ignored_layers")
        for name in _names(block.get(field) or (), f"{where}.{field}").exact
    }
    return Fp8(declaration=Declaration(format=Fp8Block(), scheme=scheme), kept=frozenset(kept))


_READERS = (("compressed-tensors", _read_compressed_tensors), ("fp8", _read_fp8))


def _names(value: Any, where: str) -> NameList:
    if not isinstance(value, Sequence) or isinstance(value, str) or not all(isinstance(v, str) for v in value):
        raise SourceError(f"config.json: {where} is {value!r}; expected a list of names")
    patterns = []
    for entry in value:
        if entry.startswith("re:"):
            try:
                patterns.append(re.compile(entry[3:]))
            except re.error as error:
                raise SourceError(f"config.json: {where} has a broken pattern {entry!r}: {error}") from None
    exact = frozenset(entry for entry in value if not entry.startswith("re:"))
    return NameList(exact, tuple(patterns))


def _format(name: Any, method: str, where: str) -> Format:
    known = [form for form in FORMATS if form.quant_method == method]
    for form in known:
        if form.name == name:
            return form
    raise SourceError(
        f"config.json: {where} has the format {name!r}; {', '.join(form.name for form in known)} can be read"
    )


def _scheme(group: Mapping[str, Any], where: str) -> Scheme:
    weights = group.get("weights")
    if not isinstance(weights, Mapping):
        raise SourceError(f"config.json: {where}.weights is {weights!r}; expected an object")
    if weights.get("actorder"):
        raise SourceError(f"config.json: {where}.weights.actorder is {weights['actorder']!r}: reordered columns")
    return Scheme(
        grid=_grid(weights, f"{where}.weights"),
        blocking=_blocking(weights, f"{where}.weights"),
        symmetric=bool(weights.get("symmetric", True)),
        scale=ScaleSpec(dtype=DType.BF16),
        activation=_activation(group.get("input_activations"), f"{where}.input_activations"),
    )


def _grid(arguments: Mapping[str, Any], where: str) -> Int | Float:
    bits, kind = arguments.get("num_bits"), arguments.get("type", "int")
    if kind == "int" and isinstance(bits, int):
        return Int(bits=bits)
    if kind == "float" and bits in (4, 8):
        return Float(kind="e4m3fn" if bits == 8 else "e2m1")
    raise SourceError(f"config.json: {where} has {bits!r} bits of type {kind!r}")


def _blocking(arguments: Mapping[str, Any], where: str) -> Blocking:
    match arguments.get("strategy"), arguments.get("group_size"), arguments.get("block_structure"):
        case "tensor", _, _:
            return PerTensor()
        case "channel", _, _:
            return Channel()
        case "group", int(size), _ if size > 0:
            return Group(size=size)
        case "block", _, [int(rows), int(cols)]:
            return Block(rows=rows, cols=cols)
        case strategy, size, block:
            raise SourceError(
                f"config.json: {where} has strategy {strategy!r}, group_size {size!r}, block_structure {block!r}"
            )


def _activation(arguments: Mapping[str, Any] | None, where: str) -> Activation:
    if arguments is None:
        return Activation()
    grid = _grid(arguments, where)
    if not arguments.get("dynamic", False):
        return Activation(kind="static", grid=grid)
    match arguments.get("strategy"), arguments.get("group_size"):
        case (("token" | None), _):
            return Activation(kind="dynamic", grid=grid)
        case "group", int(size):
            return Activation(kind="dynamic", grid=grid, group=size)
        case strategy, size:
            raise SourceError(f"config.json: {where} has strategy {strategy!r}, group_size {size!r}")
