"""What vLLM, SGLang and transformers demand of a checkpoint as a whole: names that stay, and schemes that must agree.

Sources: vLLM 0.32 and transformers 5.23, run; SGLang 0.5.23, read in its wheel.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

from qconvert.core.errors import FormatError, PlanError
from qconvert.core.scheme import Group, Scheme
from qconvert.formats.table import format_named

STACKED: tuple[tuple[str, tuple[str, ...]], ...] = (
    ("qkv_proj", ("q_proj", "k_proj", "v_proj")),
    ("gate_up_proj", ("gate_proj", "up_proj")),
    ("in_proj_qkvz", ("in_proj_qkv", "in_proj_z")),
    ("in_proj_ba", ("in_proj_b", "in_proj_a")),
)
"""Modules that vLLM and SGLang stack into one matrix product, and the name of the stack."""

EXPERT_TARGET = r"re:.*\.mlp\.experts\.\d+\.(gate|up|down)_proj$"
"""Matches every routed expert, in the names of all engines."""

FOR_ENGINE = "engine"
"""Where the block of ``config.json`` about a conversion says which engine alone it is for."""

ALONE = ("vllm",)
"""Engines that a conversion can be for alone; then what others demand need not hold."""

_LAYER = re.compile(r"^(?P<layer>.*\blayers\.\d+)\.(?P<rest>.+)$")
_EXPERT = re.compile(r"^(?P<layer>.*)\.mlp\.experts\.(?:(?P<index>\d+)\.)?(?P<part>[a-z_]+)$")
_NEVER = (
    (re.compile(r".*\.mlp\.gate$"), "the router is always dense in vLLM and in transformers"),
    (re.compile(r".*\.mlp\.shared_expert_gate$"), "the shared expert's gate is always dense in vLLM"),
    (re.compile(r"(.*\.)?visual\..*"), "engines load the vision tower dense"),
    (re.compile(r"mtp\.fc$"), "SGLang never quantizes it, and vLLM's draft model must agree"),
)


@dataclass(frozen=True, slots=True, kw_only=True)
class ModuleDecision:
    """What becomes of one linear module.

    Attributes:
        name: its name in the checkpoint without ``.weight``, for example
            ``model.language_model.layers.3.self_attn.q_proj``; experts that are stored stacked are
            ``...mlp.experts.gate_up_proj`` and ``...mlp.experts.down_proj``.
        shape: (N, K) of one matrix.
        scheme: ``None`` for a module that stays as it is.
        format: name of the format that stores ``scheme``.
        stacked: number of experts in this one tensor, 0 for a plain matrix.
    """

    name: str
    shape: tuple[int, int]
    scheme: Scheme | None = None
    format: str | None = None
    stacked: int = 0


def vllm_name(name: str) -> str:
    """What vLLM calls a module of a checkpoint with a vision tower; names of text-only ones stay."""
    for ours, theirs in (
        ("model.language_model.", "language_model.model."),
        ("model.visual.", "visual."),
        ("lm_head", "language_model.lm_head"),
    ):
        if name.startswith(ours):
            return theirs + name[len(ours) :]
    return name


def expand(decision: ModuleDecision) -> Iterator[str]:
    """The plain module names behind a decision: those of every expert where experts are stored stacked."""
    if not decision.stacked:
        yield decision.name
        return
    prefix, _, part = decision.name.rpartition(".")
    for index in range(decision.stacked):
        for plain in ("gate_proj", "up_proj") if part == "gate_up_proj" else (part,):
            yield f"{prefix}.{index}.{plain}"


def exact_names(decisions: Iterable[ModuleDecision]) -> list[str]:
    """Full names of everything that stays, in order: per module and per expert; for MTP also the names of stacks.

    vLLM matches ``modules_to_not_convert`` by equality only: a substring or a pattern there loads and answers
    nonsense. Its MTP loader looks experts up one by one even where they are stored stacked, SGLang looks for the
    stacks.
    """
    kept: dict[str, None] = {}
    for decision in decisions:
        if decision.scheme is None:
            kept.update(dict.fromkeys(expand(decision)))
    for stack, parts in STACKED:
        for name in [name for name in kept if name.startswith("mtp.") and name.endswith("." + parts[0])]:
            stem = name.removesuffix(parts[0])
            if not _EXPERT.match(name) and all(stem + part in kept for part in parts):
                kept[stem + stack] = None
    return list(kept)


def ignore_list(decisions: Sequence[ModuleDecision]) -> list[str]:
    """compressed-tensors' ``ignore``: patterns for kinds that stay everywhere, then every exact name.

    vLLM maps exact names to its own but matches ``re:`` patterns, with ``re.match``, against its own names; SGLang
    and a text-only class on a checkpoint with a vision tower do not map at all. A pattern is written only when it
    matches nothing that is quantized.
    """
    names = exact_names(decisions)
    quantized = [name for decision in decisions if decision.scheme is not None for name in expand(decision)]
    quantized += _stack_names(quantized)  # engines ask for a stack by its own name first
    quantized += [vllm_name(name) for name in quantized]
    patterns: dict[str, None] = {}
    for name in names:
        patterns.update(dict.fromkeys(_patterns(name)))
    safe = [pattern for pattern in patterns if not any(map(re.compile(pattern[3:]).match, quantized))]
    return safe + names


def _stack_names(names: Iterable[str]) -> list[str]:
    """The stacks that engines make of modules, routed experts left out."""
    plain = [name for name in names if not _EXPERT.match(name)]
    return [
        name.removesuffix(parts[0]) + stack
        for stack, parts in STACKED
        for name in plain
        if name.endswith("." + parts[0])
    ]


def kept_patterns(decisions: Sequence[ModuleDecision]) -> list[str]:
    """Regular expressions, for ``re.match``, that cover everything that stays and nothing that is quantized.

    In the names of the checkpoint and in vLLM's; those of a layer's experts cover their block, which vLLM asks for.
    Source: GPTQModel 7.7 and vLLM 0.32, ``dynamic``.
    """
    entries = ignore_list(decisions)
    patterns = [entry[3:] for entry in entries if entry.startswith("re:")]
    known = [re.compile(pattern) for pattern in patterns]
    for name in dict.fromkeys(expert_block(entry) for entry in entries if not entry.startswith("re:")):
        for one in dict.fromkeys((name, vllm_name(name))):
            if not any(pattern.match(one) for pattern in known):
                patterns.append(rf"^{re.escape(one)}(\.|$)")
    return patterns


def kept_substrings(decisions: Sequence[ModuleDecision]) -> list[str]:
    """Parts of names that cover everything that stays and nothing that is quantized, for AWQ's list.

    Kinds that stay everywhere by the end of their names, everything else by its full name, which vLLM maps.

    Raises:
        PlanError: the full name of something that stays is a part of the name of something that is quantized.
    """
    quantized = [name for decision in decisions if decision.scheme is not None for name in expand(decision)]
    parts: dict[str, None] = {}
    for name in dict.fromkeys(expert_block(name) for name in exact_names(decisions)):
        kind = next((kind for kind in _kinds(name) if not any(kind in other for other in quantized)), name)
        if any(kind in other for other in quantized):
            raise PlanError(
                f"{name} stays, but awq's list of parts of names would keep others as well: use another format"
            )
        parts[kind] = None
    return list(parts)


def _kinds(name: str) -> Iterator[str]:
    """What all modules of the kind of ``name`` have in their names, shortest first."""
    if name.startswith("mtp."):
        yield "mtp."
    if "visual." in name:
        yield "visual."
    found = _LAYER.match(name)
    if found is not None:
        yield "." + found["rest"]


def expert_block(name: str) -> str:
    """The block of experts that a routed expert's matrix belongs to; any other name as it is."""
    found = _EXPERT.match(name)
    return f"{found['layer']}.mlp.experts" if found else name


def _patterns(name: str) -> Iterator[str]:
    """Patterns, in vLLM's names, that cover a module's kind in all layers."""
    if name.startswith("mtp."):
        yield "re:^mtp.*"
        return
    if name.startswith(("model.visual.", "visual.")):
        yield r"re:.*visual\..*"
        return
    if name == "lm_head":
        yield r"re:.*lm_head$"
        return
    found = _LAYER.match(name)
    if found is None or ".mlp.experts." in name:
        return
    stem, _, part = found["rest"].rpartition(".")
    where = rf"re:.*\.{re.escape(stem)}\."
    yield rf"{where}{part}$"
    for stack, parts in STACKED:
        if part in parts:
            yield rf"{where}{stack}$"


def module_patterns(decisions: Sequence[ModuleDecision], chosen: Sequence[ModuleDecision]) -> list[str]:
    """``targets`` of the modules of ``chosen``: patterns where those match nothing else that is quantized, else names.

    What stays may match: engines look at ``ignore`` first.
    """
    mine = {decision.name for decision in chosen}
    others = [decision.name for decision in decisions if decision.scheme is not None and decision.name not in mine]
    others += [vllm_name(name) for name in others]
    targets: dict[str, None] = {}
    suffices: dict[str, bool] = {}
    for decision in chosen:
        expert = _EXPERT.match(decision.name)
        if expert is not None:
            layer = re.escape(expert["layer"].rpartition("layers.")[2])
            patterns = [EXPERT_TARGET, EXPERT_TARGET.replace(r"\.mlp", rf"\.layers\.{layer}\.mlp", 1)]
        else:
            patterns = [pattern for pattern in _patterns(decision.name) if pattern.endswith("$")][:1]
        for pattern in patterns:
            if pattern not in suffices:
                suffices[pattern] = not any(re.match(pattern[3:], name) for name in others)
        targets[next((pattern for pattern in patterns if suffices[pattern]), decision.name)] = None
    return list(targets)


def verify(decisions: Sequence[ModuleDecision], engine: str | None = None) -> None:
    """Refuse what an engine would reject, or load wrongly; with ``engine``, one of ``ALONE``, what that one would.

    Raises:
        PlanError: names the modules and the rule.
        FormatError: a format cannot hold one of the matrices.
    """
    quantized = [decision for decision in decisions if decision.scheme is not None]
    for decision in quantized:
        _check_alone(decision)
    _check_stacks(decisions)
    _check_experts(decisions, engine)
    methods = {format_named(decision.format or "").quant_method: decision.name for decision in quantized}
    if len(methods) > 1:
        listed = ", ".join(f"{method} ({name})" for method, name in sorted(methods.items()))
        raise PlanError(f"one checkpoint has one quant_method; this one would need {listed}: choose one format")
    schemes = {decision.scheme for decision in quantized}
    for method in methods.keys() - {"compressed-tensors"}:
        if len(schemes) > 1:
            raise PlanError(f"quant_method {method} has one scheme for the whole checkpoint: choose one scheme")


def _check_alone(decision: ModuleDecision) -> None:
    for pattern, why in _NEVER:
        if pattern.match(decision.name):
            raise PlanError(f"{decision.name} cannot be quantized to {decision.scheme}: {why}; keep it")
    if decision.stacked:
        raise PlanError(f"{decision.name} stacks experts; engines read quantized experts one by one: split it first")
    if decision.scheme is None or decision.format is None:
        raise PlanError(f"{decision.name} is to be quantized, but no format is named")
    try:
        format_named(decision.format).check(decision.scheme, decision.shape)
    except FormatError as reason:
        raise FormatError(f"{decision.name}: {reason}") from reason
    if decision.format == "gptq" and not decision.scheme.symmetric:
        raise PlanError(
            f"{decision.name} is to have zero points: vLLM reads symmetric gptq only, and its layout has no room for a "
            "zero point of 0; use compressed-tensors or awq"
        )
    expert = _EXPERT.match(decision.name)
    if expert is not None and isinstance(decision.scheme.blocking, Group):
        rows, cols = decision.shape
        size = decision.scheme.blocking.size
        if rows % size or cols % size:
            raise PlanError(
                f"{decision.name} is {rows} x {cols}: vLLM needs both sides of an expert divisible by the group, "
                f"which is {size}; choose a smaller one"
            )


def _check_stacks(decisions: Sequence[ModuleDecision]) -> None:
    by_name = {decision.name: decision for decision in decisions}
    for stack, parts in STACKED:
        for name in [name for name in by_name if name.endswith("." + parts[0])]:
            stem = name.removesuffix(parts[0])
            members = [by_name[stem + part] for part in parts if stem + part in by_name]
            _agree(members, f"engines stack them into {stem}{stack}, which has one scheme")


def _check_experts(decisions: Sequence[ModuleDecision], engine: str | None) -> None:
    layers: dict[str, list[ModuleDecision]] = defaultdict(list)
    for decision in decisions:
        expert = _EXPERT.match(decision.name)
        if expert is not None:
            layers[expert["layer"]].append(decision)
    for layer, members in layers.items():
        _agree(members, f"vLLM reads the scheme of all experts of {layer} at expert 0's three matrices")
    if engine != "vllm":
        first = [members[0] for members in layers.values() if members[0].scheme is not None]
        _agree(first, "transformers reads one scheme for the experts of all layers")


def _agree(members: Sequence[ModuleDecision], rule: str) -> None:
    for other in members[1:]:
        if other.scheme != members[0].scheme or other.format != members[0].format:
            ours, theirs = members[0].scheme or "kept", other.scheme or "kept"
            raise PlanError(f"{members[0].name} ({ours}) and {other.name} ({theirs}) differ: {rule}")
