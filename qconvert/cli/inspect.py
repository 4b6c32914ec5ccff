"""`qconvert inspect`: what a checkpoint holds and what each scheme would make of it, from headers alone."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict
from math import prod
from pathlib import Path
from typing import Annotated, Any

import typer

from qconvert.arch.census import Census, check
from qconvert.arch.families import describe, quant_method, read_config
from qconvert.arch.shapes import STACKED
from qconvert.cli import console
from qconvert.cli.inspect_package import inspect_package
from qconvert.cli.options import Json
from qconvert.convert import plan_conversion
from qconvert.core.errors import FormatError, PlanError, SourceError
from qconvert.core.role import Section, TensorRole
from qconvert.io.checkpoint import Checkpoint
from qconvert.io.hub import resolve
from qconvert.io.source_folder import is_package
from qconvert.plan.policy import default_policy, scheme_named
from qconvert.quantized_view import Stored, view
from qconvert.transform.experts import unstack

_OFFERED: tuple[tuple[str, int | None], ...] = (
    ("int4", 32),
    ("int4", 128),
    ("int8", None),
    ("fp8", None),
    ("fp8-block", None),
    ("w8a8", None),
    ("mxfp4", None),
    ("nvfp4", None),
    ("llm-int8", None),
    ("nf4", None),
)


def inspect(
    source: Annotated[str, typer.Argument(metavar="SRC", help="Folder of a checkpoint, or a hub id ORG/NAME.")],
    json: Json = False,
) -> None:
    """Show architecture, counts, bytes by role, and the size that each scheme would give.

    Reads headers only, whatever the checkpoint's size.

    Example:
      qconvert inspect ./Qwen3.5-35B-A3B
    """

    def call() -> int:
        folder = resolve(source)
        if is_package(folder):
            return inspect_package(folder, json=json)
        with Checkpoint.open(folder) as checkpoint:
            config = read_config(checkpoint.config, folder)
            if quant_method(checkpoint.config) is not None:
                return _quantized(checkpoint, json=json)
            try:
                census = check(checkpoint.tensors, config)
            except SourceError as error:
                raise SourceError(f"{folder}: {error}") from None
        sizes = _sizes(folder)
        if json:
            console.show_json(_document(census, sizes))
        else:
            _show(folder, census, sizes)
        return 0

    raise typer.Exit(console.guarded(call))


def _quantized(checkpoint: Checkpoint, *, json: bool) -> int:
    """A checkpoint that is quantized already: which roles in which scheme, and what contradicts itself."""
    found = view(checkpoint)
    rows: dict[tuple[str, str], tuple[int, int]] = {}
    for role, stored in found.stored.items():
        scheme = str(stored.scheme) if stored.scheme else _stored_type(checkpoint, stored)
        count, parameters = rows.get((role.path, scheme), (0, 0))
        rows[role.path, scheme] = (count + 1, parameters + prod(stored.shape))
    problems = [str(problem) for problem in found.problems]
    if json:
        console.show_json(
            {
                "architecture": describe(found.config),
                "bytes": sum(info.nbytes for info in checkpoint.tensors.values()),
                "quant_method": quant_method(checkpoint.config),
                "roles": [
                    {"path": path, "scheme": scheme, "tensors": count, "parameters": parameters}
                    for (path, scheme), (count, parameters) in rows.items()
                ],
                "policy_paths": sorted({path for role in found.stored for path in _paths(role)}),
                "problems": problems,
            }
        )
    else:
        total = sum(info.nbytes for info in checkpoint.tensors.values())
        console.say(f"{describe(found.config)}  {checkpoint.path}  {console.gigabytes(total)}, quantized", style="bold")
        table = console.plain_table("role", "scheme", ">tensors", ">parameters")
        for (path, scheme), (count, parameters) in rows.items():
            table.add_row(path, scheme, f"{count:,}", f"{parameters:,}")
        console.show(table)
        for problem in problems:
            console.say(f"problem: {problem}", style="red")
    if problems:
        raise SourceError(f"{checkpoint.path}: {len(problems)} tensors contradict config.json")
    return 0


def _stored_type(checkpoint: Checkpoint, stored: Stored) -> str:
    return checkpoint.tensors[stored.plain.tensor].dtype.value if stored.plain else ""


def _sizes(folder: Path) -> dict[str, int | str]:
    """Output bytes by scheme, or why the scheme is impossible."""
    sizes: dict[str, int | str] = {}
    for name, group in _OFFERED:
        label = name if group is None else f"{name} --group {group}"
        try:
            sizes[label] = plan_conversion(folder, default_policy(scheme_named(name, group=group))).layout.nbytes
        except (PlanError, FormatError) as error:
            sizes[label] = str(error)
    return sizes


def _document(census: Census, sizes: dict[str, int | str]) -> dict[str, Any]:
    return {
        "architecture": describe(census.config),
        "parameters": census.parameters(),
        "parameters_by_section": {section.value: census.parameters(section) for section in Section},
        "active_parameters": census.active_parameters,
        "bytes": census.nbytes,
        "roles": [asdict(line) for line in census.lines()],
        "policy_paths": sorted(_policy_paths(census)),
        "notes": list(census.notes),
        "schemes": {
            label: {"bytes": size} if isinstance(size, int) else {"impossible": size} for label, size in sizes.items()
        },
    }


def _policy_paths(census: Census) -> set[str]:
    """What the rules of a policy are matched against: experts are decided one by one, however they are stored."""
    paths: set[str] = set()
    for name, role in census.roles.items():
        stacked = role.kind in STACKED and role.expert is None
        ones = [one for one, _ in unstack(census.tensors[name], role)] if stacked else [role]
        paths.update(path for one in ones for path in _paths(one))
    return paths


def _paths(role: TensorRole) -> Iterator[str]:
    """The path of a tensor, and those of its halves."""
    return (one.path for one in (role, *role.halves))


def _show(folder: Path, census: Census, sizes: dict[str, int | str]) -> None:
    text = census.config.text
    full = text.layer_types.count("full_attention")
    console.say(f"{describe(census.config)}  {folder}", style="bold")
    console.say(
        f"{census.parameters() / 1e9:.3g} B parameters, {census.active_parameters / 1e9:.3g} B active per token; "
        f"{text.num_hidden_layers} layers ({text.num_hidden_layers - full} linear, {full} full attention), "
        f"{text.num_experts} experts top-{text.num_experts_per_tok}, {census.mtp_layers} MTP layers"
    )
    for line in census.notes:
        console.say(f"note: {line}", style="yellow")
    table = console.plain_table("what", "type", ">tensors", ">parameters", ">bytes", ">share")
    for (family, dtype), (tensors, parameters, nbytes) in _families(census).items():
        table.add_row(
            family, dtype, f"{tensors:,}", f"{parameters:,}", console.gigabytes(nbytes), f"{nbytes / census.nbytes:.1%}"
        )
    console.show(table)
    table = console.plain_table("quantize --scheme", ">bytes", "of the original")
    for label, size in sizes.items():
        if isinstance(size, int):
            table.add_row(label, console.gigabytes(size), f"{size / census.nbytes:.1%}")
        else:
            table.add_row(label, "impossible", size)
    console.show(table)


def _families(census: Census) -> dict[tuple[str, str], tuple[int, int, int]]:
    """Tensors, parameters and bytes by the first two steps of role paths; ``--json`` has every role."""
    families: dict[tuple[str, str], tuple[int, int, int]] = {}
    for line in census.lines():
        key = (console.family(line.path), line.dtype)
        tensors, parameters, nbytes = families.get(key, (0, 0, 0))
        families[key] = (tensors + line.tensors, parameters + line.parameters, nbytes + line.nbytes)
    return families
