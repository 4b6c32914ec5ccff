"""A ``quantization_config`` of compressed-tensors read."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from qconvert.core.dtypes import DType
from qconvert.core.errors import SourceError
from qconvert.core.scheme import Activation, Block, Blocking, Channel, Float, Group, Int, PerTensor, ScaleSpec, Scheme
from qconvert.formats.base import Format
from qconvert.formats.declaration import Declaration, Declared, NameList, names_of
from qconvert.formats.float_quantized import FloatQuantized
from qconvert.formats.fp8_tensor import TENSOR_SCALED
from qconvert.formats.pack_quantized import REORDERED, PackQuantized
from qconvert.formats.table import FORMATS


@dataclass(frozen=True, slots=True, kw_only=True)
class CompressedTensors:
    """``quant_method: compressed-tensors``: groups with targets, and what they leave out.

    A full name decides before a pattern, a pattern before the class ``Linear``, the first group among equals
    (compressed-tensors 0.20).
    """

    groups: tuple[tuple[NameList, Declaration], ...]
    ignore: NameList
    complete: bool = True

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


def read_compressed_tensors(block: Mapping[str, Any]) -> Declared:
    """What groups and ``ignore`` declare.

    Raises:
        SourceError: a format or an argument that cannot be read here; the message names it.
    """
    groups = block.get("config_groups")
    if not isinstance(groups, Mapping) or not groups:
        raise SourceError("config.json: quantization_config has no config_groups")
    read = []
    for name, group in groups.items():
        where = f"quantization_config.config_groups.{name}"
        if not isinstance(group, Mapping):
            raise SourceError(f"config.json: {where} is {group!r}; expected an object")
        scheme = _scheme(group, where)
        form = _format(group.get("format") or block.get("format"), group, scheme, where)
        read.append((names_of(group.get("targets"), f"{where}.targets"), Declaration(format=form, scheme=scheme)))
    ignore = names_of(block.get("ignore") or (), "quantization_config.ignore")
    return CompressedTensors(groups=tuple(read), ignore=ignore)


def _format(name: Any, group: Mapping[str, Any], scheme: Scheme, where: str) -> Format:
    known = [form for form in FORMATS if form.quant_method == "compressed-tensors"]
    for form in known:
        if form.name != name:
            continue
        if form == FloatQuantized() and scheme.blocking == PerTensor():
            return TENSOR_SCALED
        # `static` reorders while it rounds and stores groups that are consecutive
        if group["weights"].get("actorder") not in ("group", "dynamic"):
            return form
        if form != PackQuantized():
            raise SourceError(f"config.json: {where} has activation order in {name}; it can be read in pack-quantized")
        return REORDERED
    raise SourceError(
        f"config.json: {where} has the format {name!r}; {', '.join(form.name for form in known)} can be read"
    )


def _scheme(group: Mapping[str, Any], where: str) -> Scheme:
    weights = group.get("weights")
    if not isinstance(weights, Mapping):
        raise SourceError(f"config.json: {where}.weights is {weights!r}; expected an object")
    order = weights.get("actorder")
    if order not in (None, False, "static", "weight", "group", "dynamic"):
        raise SourceError(f"config.json: {where}.weights.actorder is {order!r}; static and group can be read")
    symmetric = weights.get("symmetric", True)
    if not isinstance(symmetric, bool):
        raise SourceError(f"config.json: {where}.weights.symmetric is {symmetric!r}; expected true or false")
    return Scheme(
        grid=_grid(weights, f"{where}.weights"),
        blocking=_blocking(weights, f"{where}.weights"),
        symmetric=symmetric,
        scale=ScaleSpec(dtype=DType.BF16, second=DType.F32 if weights.get("strategy") == "tensor_group" else None),
        activation=_activation(group.get("input_activations"), f"{where}.input_activations"),
    )


def _grid(arguments: Mapping[str, Any], where: str) -> Int | Float:
    bits, kind = arguments.get("num_bits"), arguments.get("type", "int")
    if kind == "int" and type(bits) is int and bits > 0:
        return Int(bits=bits)
    if kind == "float" and type(bits) is int and bits in (4, 8):
        return Float(kind="e4m3fn" if bits == 8 else "e2m1")
    raise SourceError(f"config.json: {where} has {bits!r} bits of type {kind!r}")


def _blocking(arguments: Mapping[str, Any], where: str) -> Blocking:
    match arguments.get("strategy"), arguments.get("group_size"), arguments.get("block_structure"):
        case "tensor", _, _:
            return PerTensor()
        case "channel", _, _:
            return Channel()
        case (("group" | "tensor_group"), int(size), _) if size > 0:
            return Group(size=size)
        case "block", _, [int(rows), int(cols)]:
            return Block(rows=rows, cols=cols)
        case strategy, size, block:
            raise SourceError(
                f"config.json: {where} has strategy {strategy!r}, group_size {size!r}, block_structure {block!r}"
            )


def _activation(arguments: object, where: str) -> Activation:
    if arguments is None:
        return Activation()
    if not isinstance(arguments, Mapping):
        raise SourceError(f"config.json: {where} is {arguments!r}; expected an object")
    grid = _grid(arguments, where)
    if not arguments.get("dynamic", False):
        return Activation(kind="static", grid=grid)
    match arguments.get("strategy"), arguments.get("group_size"):
        case (("token" | None), _):
            return Activation(kind="dynamic", grid=grid)
        case (("group" | "tensor_group"), int(size)):
            return Activation(kind="dynamic", grid=grid, group=size)
        case strategy, size:
            raise SourceError(f"config.json: {where} has strategy {strategy!r}, group_size {size!r}")
