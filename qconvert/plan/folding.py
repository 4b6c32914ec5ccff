"""Decided tensors -> the same with the shared expert stored as further routed experts, or the other way round.

Whatever decided them, a policy, a move of codes or nothing at all, folding changes places only. Per-expert names go on
where the routed ones end, ``mlp.experts.E.gate_proj``; a stack of E experts becomes one of E + n. The shared expert's
gate keeps its name: every one of the n weighs sigmoid(x . gate).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import tomlkit
import xxhash

from qconvert.arch.census import Census
from qconvert.arch.names import module_of, name_of
from qconvert.core.dtypes import DType
from qconvert.core.errors import FormatError, PlanError, SourceError
from qconvert.core.plan import Action, Folding, Mosaic, Quantize, Reading, Reencode, Slice, Step, Tile
from qconvert.core.role import EXPERT_KINDS, Kind, Section
from qconvert.core.scheme import Scheme
from qconvert.formats.engine_rules import ModuleDecision
from qconvert.formats.table import format_for, format_named
from qconvert.plan.decided import Decided, StoredAs, kept_module
from qconvert.plan.policy import Policy, Rule
from qconvert.plan.row_blocks import mosaic_peak_bytes
from qconvert.transform.rectangles import Span, blocks_of
from qconvert.transform.shared_expert import FOLDED, Share, matrix_shape, shares
from reference_model.config import TextConfig
from reference_model.config_fold import FOLD, NOTE, fold_block, folded_count, note_of

_Layer = tuple[Section, int | None]

_STACK = {
    Kind.EXPERT_GATE: Kind.EXPERT_GATE_UP,
    Kind.EXPERT_UP: Kind.EXPERT_GATE_UP,
    Kind.EXPERT_DOWN: Kind.EXPERT_DOWN,
}


@dataclass(slots=True, kw_only=True)
class _Block:
    """What is decided of one layer's experts.

    Attributes:
        shared: the shared expert's matrices.
        stacks: stacks of all experts, which are only ever kept.
        experts: one step of each routed matrix, by kind and expert.
    """

    shared: dict[Kind, Decided] = field(default_factory=dict)
    stacks: dict[Kind, Decided] = field(default_factory=dict)
    experts: dict[tuple[Kind, int], Decided] = field(default_factory=dict)


def fold_shared_experts(decided: list[Decided], census: Census, where: Path) -> list[Decided]:
    """Store the shared expert of every layer as the experts behind the routed ones, in the scheme that both have.

    Args:
        decided: every tensor of ``census``.
        census: of the source.
        where: the source, for messages.

    Raises:
        SourceError: its shared expert is folded already.
        PlanError: shared and routed experts of a layer are not stored alike; the message has the rule that would do it.
        FormatError: the codes of the shared expert cannot be cut, or do not fit the format in pieces.
    """
    text = census.config.text
    if text.folded_experts:
        raise SourceError(f"{where}: its shared expert is folded already")
    blocks, others = _blocks(decided)
    for layer, block in blocks.items():
        _check_alike(layer, block)
    return others + [one for block in blocks.values() for one in _folded(block, census)]


def unfold_shared_experts(decided: list[Decided], census: Census, where: Path) -> list[Decided]:
    """The inverse of ``fold_shared_experts``.

    Raises:
        SourceError: the shared expert of the source is not folded.
        FormatError: the shared expert's matrices do not fit the format.
    """
    if not census.config.text.folded_experts:
        raise SourceError(f"{where}: its shared expert is not folded, so there is nothing to unfold")
    blocks, others = _blocks(decided)
    return others + [one for block in blocks.values() for one in _unfolded(block, census)]


def folded_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """``config.json`` of the folded checkpoint: the counts of what is stored, and the original ones in a block."""
    text = config.get("text_config", config)
    count = folded_count(text["shared_expert_intermediate_size"], text["moe_intermediate_size"])
    written = _with_counts(config, {name: text[name] + count for name in ("num_experts", "num_experts_per_tok")})
    return {**written, NOTE: {**note_of(config), FOLD: fold_block(text)}}


def unfolded_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """The inverse of ``folded_config``."""
    note = dict(config[NOTE])
    kept = note.pop(FOLD)
    written = _with_counts(config, {name: kept[name] for name in ("num_experts", "num_experts_per_tok")})
    del written[NOTE]
    return {**written, NOTE: note} if note else written


def folding_hash(folding: Folding, policy: str = "") -> str:
    """xxh3-128 of what decides: ``folding``, and the hash of a policy."""
    return xxhash.xxh3_128_hexdigest(repr(("shared expert", folding.value, policy)).encode())


def _with_counts(config: Mapping[str, Any], counts: Mapping[str, int]) -> dict[str, Any]:
    if "text_config" in config:
        return {**config, "text_config": {**config["text_config"], **counts}}
    return {**config, **counts}


def _blocks(decided: list[Decided]) -> tuple[dict[_Layer, _Block], list[Decided]]:
    """Experts by layer, and everything else."""
    blocks: dict[_Layer, _Block] = {}
    others: list[Decided] = []
    for one in decided:
        role = one.step.role
        if role.kind not in FOLDED and role.kind not in EXPERT_KINDS:
            others.append(one)
            continue
        block = blocks.setdefault((role.section, role.layer), _Block())
        if role.kind in FOLDED:
            block.shared[role.kind] = one
        elif role.expert is None:
            block.stacks[role.kind] = one
        else:
            block.experts[role.kind, role.expert] = one
    return blocks, others


def _check_alike(layer: _Layer, block: _Block) -> None:
    """Refuse to fold what is stored in two ways: folding changes no scheme."""
    routed = {_way(one): one for one in (*block.stacks.values(), *block.experts.values())}
    for kind, shared in block.shared.items():
        stack, way = block.stacks.get(_STACK[FOLDED[kind]]), _way(shared)
        alike = [one for (its, _), one in block.experts.items() if its is FOLDED[kind]] if stack is None else [stack]
        other = next((one for one in alike if _way(one) != way), None)
        if other is None:
            continue
        differ = (
            f"{_name(shared)} is {_words(shared)}, {_name(other)} is {_words(other)}: folding changes no scheme, so "
            "both must be stored alike. "
        )
        if _way(shared)[0] is None and _way(other)[0] is None:
            raise PlanError(f"{differ}Their element types differ in the source, which nothing here changes")
        preset = len(routed) == 1 and layer[0] is Section.TEXT and _way(other)[0] is not None
        raise PlanError(
            f"{differ}This rule in a policy of `qconvert quantize` does it"
            f"{', so does `--preset fusable`' if preset else ''}:\n{_rule(shared, other, apart=len(routed) > 1)}"
        )


def _way(one: Decided) -> tuple[Scheme | None, str | None, DType]:
    """How a matrix is stored."""
    scheme, form = (None, None) if one.module is None else (one.module.scheme, one.module.format)
    return scheme, form, one.stored[0][0]


def _words(one: Decided) -> str:
    scheme, form, dtype = _way(one)
    return f"plain {dtype}" if scheme is None else f"{scheme} ({form})"


def _rule(shared: Decided, routed: Decided, *, apart: bool) -> str:
    """The line of a policy that stores a matrix of the shared expert, or all of them, like ``routed``."""
    scheme, form, _ = _way(routed)
    method = None
    if scheme is not None and form is not None and format_for(scheme).name != form:
        method = format_named(form).quant_method
    match = shared.step.role.path if apart else f"{shared.step.role.section.value}.shared_expert.*"
    rule = Rule(match=match, scheme=scheme, method=method, reason="as the routed experts")
    return tomlkit.dumps({"rule": Policy(rules=(rule,)).entries()}).strip()


def _name(one: Decided) -> str:
    return one.step.outputs[0] if one.module is None else one.module.name


def _folded(block: _Block, census: Census) -> Iterator[Decided]:
    text = census.config.text
    yield from block.experts.values()
    for kind, shared in block.shared.items():
        if _STACK[FOLDED[kind]] not in block.stacks:
            for number, share in enumerate(shares(text.shared_expert_intermediate_size, text.moe_intermediate_size)):
                yield _piece(shared, share, text.num_experts + number, census)
    for stack in block.stacks.values():
        yield _longer(stack, block.shared, text)


def _piece(shared: Decided, share: Share, expert: int, census: Census) -> Decided:
    """One matrix of the shared expert, cut to the units of one expert."""
    role, text = shared.step.role, census.config.text
    name = name_of(replace(role, kind=FOLDED[role.kind], expert=expert), census.naming)
    shape = matrix_shape(role.kind, share.width, text.hidden_size)
    mosaic = Mosaic(tiles=(_tile(shared, share, text),), shape=shape)
    return _laid(shared, mosaic, shape, name, "the shared expert, always on")


def _tile(shared: Decided, share: Share, text: TextConfig, at: tuple[int, int] = (0, 0)) -> Tile:
    """The units ``share`` of a matrix of the shared expert."""
    kind = shared.step.role.kind
    check_share(_name(shared), None if shared.module is None else shared.module.scheme, kind, share, text)
    return units(shared.step.reading, kind, share, text, at)


def units(reading: Reading, kind: Kind, share: Share, text: TextConfig, at: tuple[int, int] = (0, 0)) -> Tile:
    """The units ``share`` of the shared expert's matrix of ``kind``, to lie ``at`` a row and a column."""
    rows, cols = share.source(kind, text.hidden_size)
    _, width = matrix_shape(kind, text.shared_expert_intermediate_size, text.hidden_size)
    return _rectangle(reading, rows, cols, width, at)


def check_share(name: str, scheme: Scheme | None, kind: Kind, share: Share, text: TextConfig) -> None:
    """Refuse units whose edges go through blocks of ``scheme``.

    Raises:
        FormatError: names the module ``name``.
    """
    shape = matrix_shape(kind, text.shared_expert_intermediate_size, text.hidden_size)
    _check_cut(name, scheme, shape, *share.source(kind, text.hidden_size))


def _rectangle(reading: Reading, rows: tuple[int, int], cols: tuple[int, int], width: int, at: tuple[int, int]) -> Tile:
    """A tile of a matrix; of a plain one no other rows are read."""
    if reading.packed is None:
        (whole,) = reading.inputs
        part = Slice(tensor=whole.tensor, begin=whole.begin + rows[0], end=whole.begin + rows[1])
        reading, rows = Reading(inputs=(part,)), (0, rows[1] - rows[0])
    return Tile(reading=reading, rows=rows, cols=cols, width=width, at=at)


def _check_cut(name: str, scheme: Scheme | None, shape: tuple[int, int], rows: Span, cols: Span) -> None:
    if scheme is None:
        return
    try:
        blocks_of(scheme, shape, rows, cols)
    except FormatError as reason:
        raise FormatError(f"{name} cannot be folded or unfolded: {reason}") from None


def _longer(stack: Decided, shared: Mapping[Kind, Decided], text: TextConfig) -> Decided:
    """A stack of E experts with the shared expert's n behind them."""
    experts, rows, cols = stack.stored[0][1]
    tiles = [_rectangle(stack.step.reading, (0, experts * rows), (0, cols), cols, (0, 0))]
    inside = [kind for kind, expert in FOLDED.items() if _STACK[expert] is stack.step.role.kind]
    width, height = text.moe_intermediate_size, rows // len(inside)
    count = experts
    for share in shares(text.shared_expert_intermediate_size, width):
        for number, kind in enumerate(inside):
            tiles.append(_tile(shared[kind], share, text, (count * rows + number * height, 0)))
        count += 1
    mosaic = Mosaic(tiles=tuple(tiles), shape=(count * rows, cols))
    return _laid(stack, mosaic, (count, rows, cols), stack.step.outputs[0], "the shared expert behind them")


def _unfolded(block: _Block, census: Census) -> Iterator[Decided]:
    text = census.config.text
    yield from (one for (_, expert), one in block.experts.items() if expert < text.num_experts)
    for stack in block.stacks.values():
        yield _shorter(stack, text.num_experts)
    for kind in FOLDED:
        yield _whole(block, kind, census)


def _shorter(stack: Decided, experts: int) -> Decided:
    """The first experts of a stack."""
    dtype, shape = stack.stored[0]
    (whole,) = stack.step.inputs
    short = (experts, *shape[1:])
    part = replace(whole, end=whole.begin + experts * shape[1])
    name = stack.step.outputs[0]
    return Decided(
        step=replace(stack.step, inputs=(part,)),
        stored=((dtype, short),),
        module=kept_module(stack.step.role, short, name),
    )


def _whole(block: _Block, kind: Kind, census: Census) -> Decided:
    """A matrix of the shared expert, laid together from those of the experts that hold it."""
    text = census.config.text
    hidden, width, shared = text.hidden_size, text.moe_intermediate_size, text.shared_expert_intermediate_size
    piece = matrix_shape(kind, width, hidden)
    tiles, nothing = [], []
    holder: Decided | None = None
    for number, share in enumerate(shares(shared, width), start=text.num_experts):
        before = holder
        holder, first = _holder(block, FOLDED[kind], number)
        if before is not None and _way(before) != _way(holder):
            raise PlanError(
                f"{_name(before)} is {_words(before)}, {_name(holder)} is {_words(holder)}: parts of one matrix of the "
                "shared expert must be stored alike to be unfolded"
            )
        scheme = None if holder.module is None else holder.module.scheme
        _check_cut(_name(holder), scheme, piece, *share.target(kind, hidden))
        (row, _), (col, _) = share.source(kind, hidden)
        tiles.append(_inside(holder, first, share.target(kind, hidden), piece[1], (row, col)))
        if share.end - share.begin < width:
            nothing.append(_inside(holder, first, share.rest(kind, hidden), piece[1], (0, 0)))
    if holder is None:
        raise SourceError(f"the shared expert has no units: its width is {shared}")
    role = replace(holder.step.role, kind=kind, expert=None)
    mosaic = Mosaic(tiles=tuple(tiles), shape=matrix_shape(kind, shared, hidden), nothing=tuple(nothing))
    like = replace(holder, step=replace(holder.step, role=role))
    return _laid(like, mosaic, mosaic.shape, name_of(role, census.naming), "the shared expert by itself")


def _inside(holder: Decided, first: int, where: tuple[Span, Span], width: int, at: tuple[int, int]) -> Tile:
    """A rectangle of an expert's matrix, which begins at row ``first`` of what holds it."""
    (begin, end), cols = where
    return _rectangle(holder.step.reading, (first + begin, first + end), cols, width, at)


def _holder(block: _Block, kind: Kind, expert: int) -> tuple[Decided, int]:
    """What holds one expert's matrix, and the row at which it begins there."""
    stack = block.stacks.get(_STACK[kind])
    if stack is None:
        return block.experts[kind, expert], 0
    rows = stack.stored[0][1][1]
    return stack, expert * rows + (rows // 2 if kind is Kind.EXPERT_UP else 0)


def _laid(like: Decided, mosaic: Mosaic, shape: tuple[int, ...], name: str, told: str) -> Decided:
    """The decision ``like`` about a matrix of ``shape`` that is laid together and stored under ``name``."""
    step, action = like.step, like.step.action
    reason = f"{action.reason}; {told}"
    if isinstance(action, Quantize | Reencode):
        module = module_of(name)
        form = format_named(action.format)
        rows, cols = mosaic.shape
        try:
            specs = form.parts(action.scheme, (rows, cols))
        except FormatError as error:
            raise FormatError(f"{module} cannot be stored as {action.scheme}: {error}") from None
        outputs = tuple(f"{module}.{spec.suffix}" for spec in specs)
        stored: StoredAs = tuple((spec.dtype, spec.shape) for spec in specs)
        multiple = form.row_block(action.scheme, mosaic.shape)
        decision: ModuleDecision | None = ModuleDecision(
            name=module, shape=mosaic.shape, scheme=action.scheme, format=action.format
        )
        changed: Action = replace(action, module=module, reason=reason)
    else:
        outputs, stored, multiple = (name,), ((like.stored[0][0], shape),), 1
        decision = kept_module(step.role, shape, name)
        changed = replace(action, name=name, reason=reason)
    return Decided(
        step=Step(
            inputs=mosaic.inputs,
            role=step.role,
            action=changed,
            outputs=outputs,
            peak_bytes=mosaic_peak_bytes(mosaic, multiple),
            packed=mosaic.tiles[0].reading.packed,
            mosaic=mosaic,
        ),
        stored=stored,
        module=decision,
    )
